"""The contraction term of D and E, and faults that were left out, on a pretrained model (notebook 27).

Conditions of a seed share texts, faults and the trust network that training begins with; validation decides which of
a run's parameters are kept, those before training among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from cachemedic.core.progress import tqdm
from cachemedic.corruption.types import NONE
from cachemedic.data.task_data import TaskData
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation import statistics as stats
from cachemedic.evaluation.experiments import TYPES, kept_frame, run_grid
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies import pretrained
from cachemedic.studies.family_study import token_aware_config, untrained
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import advantage, in_order, summary
from cachemedic.studies.sweeps import by_condition, defenses_of, stacks
from cachemedic.token.joint import JointModel
from cachemedic.training.bank import BankConfig
from cachemedic.training.config import TrainConfig
from cachemedic.training.log import LOG
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer

FITTED, FREE, LEFT_OUT = "fitted only", "lambda 0, alpha 0", "left out"
# Weights and thresholds of the term: none, that of the embedded bases, more of it, that of the source.
TERMS = {"D": ((0.0, 0.0), (0.05, 0.0), (0.5, 0.0), (0.5, 0.8)), "E": ((0.0, 0.0), (0.5, 0.8))}
TRANSFERRED = "D"  # the family whose trust network is fitted without each type
SEEDS, STEPS, LAST = 3, 20, 10  # of the runs; updates; those over which the ratio of contraction is a mean
ENDS = ("", "_low", "_high")  # of the columns of an interval
PREFIX, DECODED, SAMPLES = 64, 8, 48  # tokens of a training text, and texts a seed
WINDOWS, SEVERITIES = 4, (0.1, 0.5)  # texts a seed on which the runs are compared, and the faults that they meet


def common(run: Run, base: Base, source: TextSource, family: str) -> TrainConfig:
    """What the conditions share: how a family is trained on the embedded bases, but for fewer and shorter texts."""
    seeds = run.parameters["seeds"][:SEEDS]
    config = token_aware_config(base, family, seeds, run.smoke)
    samples = (8 if run.smoke else SAMPLES) * len(seeds)
    bank = BankConfig(samples=samples, prefix=PREFIX, decoded=DECODED, source=source)
    return replace(config, bank=bank, steps=1 if run.smoke else STEPS, checkpoint_every=5)


def conditions(config: TrainConfig, terms: Sequence[tuple[float, float]]) -> dict[str, TrainConfig]:
    """The trust network as it was fitted to known faults, and trained with each contraction term."""
    named = {f"lambda {w:g}, alpha {a:g}": RepairObjective(lambda_contr=w, alpha_contr=a) for w, a in terms}
    trained = {name: replace(config, objectives=(objective,)) for name, objective in named.items()}
    return {FITTED: untrained(config)} | trained


def operators(
    run: Run, base: Base, named: Mapping[str, TrainConfig], joint: JointModel
) -> tuple[dict[str, RepairOperator], pd.DataFrame]:
    """The operators of every condition, a stack of one run a seed, and `contraction` of those that were trained."""
    found: dict[str, RepairOperator] = {}
    ratios = []
    for config, names in stacks(base, named):
        folder = run.partial / config.key(base)
        found |= by_condition(Trainer(base, config, folder, statistics=joint).run(), names)
        if config.steps:
            ratios.append(contraction(pd.read_json(folder / LOG, lines=True), names))
    return {name: found[name] for name in named}, pd.concat(ratios, ignore_index=True)


def contraction(log: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The ratio of the error after repair to that before, of a training log's last updates: t intervals over seeds.

    names: the conditions, in the order of the objectives. Columns reader, rho and its bounds, and less that of the
    first condition, paired (`rho_less`).
    """
    last = log[log["step"] > log["step"].max() - LAST]
    places = last["run_id"].str.extract(r"/seed(?P<seed>\d+)/condition(?P<condition>\d+)$").astype(int)
    means = last.assign(**places).groupby(["condition", "seed"])["rho_mean"].mean()
    rows = []
    for place, name in enumerate(names):
        less = stats.paired_interval(means[place], means[0])
        rows.append({"reader": name, **stats.t_interval(means[place]).columns("rho"), **less.columns("rho_less")})
    return pd.DataFrame(rows)


def compared(rows: pd.DataFrame, ratios: pd.DataFrame) -> pd.DataFrame:
    """`summary` of the grid of a family, and the KL spared of the mildest faults (`mild_recovery`); `contraction`.

    more_than_free, more_than_fitted: what is spared more than without the term, and than before training, shares of
    the KL, paired.
    """
    overall = summary(rows)
    mild = summary(rows[(rows["type"] == NONE) | (rows["severity"] <= min(SEVERITIES))])
    mild = mild.rename(columns=lambda c: c.replace("kl_recovery", "mild_recovery"))
    overall = overall.merge(mild[["reader", *(f"mild_recovery{end}" for end in ENDS)]], on="reader")
    for reference, name in ((FREE, "more_than_free"), (FITTED, "more_than_fitted")):
        gain = advantage(rows, reference).rename(columns=lambda c, name=name: c.replace("kl_advantage", name))
        overall = overall.merge(gain[["reader", *(name + end for end in ENDS)]], on="reader")
    return overall.merge(ratios, on="reader", how="left")


def held_out(
    run: Run, base: Base, config: TrainConfig, tasks: Mapping[str, TaskData], joint: JointModel, kinds: Sequence[str]
) -> pd.DataFrame:
    """Each type, read through the trust network that was fitted without it: reader "left out"."""

    def of_kind(kind: str) -> pd.DataFrame:
        lacking = replace(untrained(config), mixture=config.mixture.without(kind))
        operator = Trainer(base, lacking, run.partial / lacking.key(base), statistics=joint).run()
        readers = defenses_of(base, {LEFT_OUT: operator})
        return run_grid(base, tasks, readers, None, types=(kind,), severities=SEVERITIES).assign(held_out=kind)

    parts = [
        kept_frame(run.partial / f"left-out-{kind}.csv", partial(of_kind, kind))
        for kind in tqdm(kinds, desc=f"types left out, {base.name}")
    ]
    return pd.concat(parts, ignore_index=True)


def transfer(rows: pd.DataFrame, held: pd.DataFrame) -> pd.DataFrame:
    """For each type `summary` of no defence, of the trust network fitted to all types and of that without it.

    more_than_fitted: what the latter spares more of the KL, a share of the damage, paired.
    """
    frames = []
    for kind, own in held.groupby("held_out", sort=False):
        seen = rows[rows["reader"].isin(("none", FITTED)) & rows["type"].isin((NONE, kind))]
        both = pd.concat([seen, own.drop(columns="held_out")], ignore_index=True)
        gain = advantage(both, FITTED).rename(columns=lambda c: c.replace("kl_advantage", "more_than_fitted"))
        gain = gain[["reader", *(f"more_than_fitted{end}" for end in ENDS)]]
        frames.append(summary(both).merge(gain, on="reader").assign(held_out=kind))
    found = pd.concat(frames, ignore_index=True)
    return found[found["reader"] != "none"].reset_index(drop=True)


def results(run: Run, source: TextSource) -> dict[str, pd.DataFrame]:
    """`source`: the text; what the parameters record of it are names and a digest."""
    base = pretrained.base_of(run)
    made, types = pretrained.operators(base, source), TYPES[:2] if run.smoke else TYPES
    grids, found = [], []
    for family, terms in TERMS.items():
        config, joint = common(run, base, source, family), made[family].calibrated
        trained, ratios = operators(run, base, conditions(config, terms[:2] if run.smoke else terms), joint)
        count = 2 if run.smoke else WINDOWS
        task = pretrained.language_task(base, source.documents_of("test"), "test", config.seeds, count, PREFIX)
        tasks, readers = {"perplexity": task}, {"none": NoDefense(), **defenses_of(base, trained)}
        rows = run_grid(base, tasks, readers, run.partial / family, types=types, severities=SEVERITIES)
        if family == TRANSFERRED:
            held = held_out(run, base, config, tasks, joint, types)
            left_out = transfer(rows, held)
        grids.append(rows.assign(family=family))
        found.append(in_order(compared(rows, ratios), "reader", readers).assign(family=family))
    return {
        "pretrained_stability_grid": pd.concat(grids, ignore_index=True),
        "pretrained_stability": pd.concat(found, ignore_index=True),
        "pretrained_left_out_grid": held,
        "pretrained_left_out": left_out,
    }
