"""Learned steps, repair, and both, of a cache in KIVI's layout, at equal bytes (notebook 20)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from cachemedic.corruption.apply import Mixture
from cachemedic.corruption.storage_faults import KIVI_GROUPS
from cachemedic.evaluation import statistics as stats
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import calibration_of, standard_tasks
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.family_study import token_aware_config
from cachemedic.studies.quantised_evaluation import (
    Storage,
    code_alone,
    fixed_ranges,
    full,
    quantised,
    quantised_scores,
)
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of
from cachemedic.studies.sweeps import by_condition
from cachemedic.token.coder import joint_operator
from cachemedic.token.joint_calibration import joint_of
from cachemedic.token.token_repair import TokenRepair
from cachemedic.training.bank import WITH_REVIEWS, BankConfig
from cachemedic.training.config import Objective, TrainConfig
from cachemedic.training.kept_operators import load_or_train
from cachemedic.training.objective import RepairObjective
from cachemedic.training.valence.head import shipped_valence
from cachemedic.training.valence.objective import ValenceObjective
from cachemedic.training.valence.quantiser import BITS, KVQuantiser, QuantiserConfig

STEPS = {"steps": 50, "repair": 30, "both": 30}
BATCH = {"steps": 4, "repair": 2, "both": 2}  # an estimate by E takes longer
# Bits and group of what is trained. With E groups are twice as long as without, and its code takes the bytes that this
# saves: 2 bits in groups of 128 with E have the bytes of 2 bits in groups of 64.
LEARNED = ((4, 64), (3, 64), (2, 64), (2, 128))
REPAIRED, SHARE = (2, 128), 1 / 64  # the share is one of the bytes of a bf16 cache
ALONE = (1 / 64, 1 / 32, 1 / 16)  # shares of a code without a cache
KIVI, NEAREST, CODE = "KIVI", "fixed ranges", "code of E alone"
STEPS_ALONE, REPAIR, BOTH = "learned steps", "KIVI + E", "learned steps + E"
METHODS = {STEPS_ALONE: "steps", REPAIR: "repair", BOTH: "both"}  # what is trained
VALENCE_AT = (2, 64)  # bits and group at which the valence objective trains steps, too
AGAINST = {KIVI: (NEAREST,), STEPS_ALONE: (KIVI,), REPAIR: (KIVI, STEPS_ALONE), BOTH: (KIVI, STEPS_ALONE, REPAIR)}
MEASURES = ("kl", "lost", "valence_gap")


def examples(run: Run) -> int:
    """Texts a seed."""
    return 2 if run.smoke else 16


def bits_of(run: Run) -> tuple[int, ...]:
    """Of a number."""
    return BITS[-1:] if run.smoke else BITS


def conditions(run: Run, base: Base) -> Iterator[tuple[str, TrainConfig]]:
    """What is trained: a method, and the configuration of bits and group, whose objectives are one stack."""
    seeds, smoke = run.parameters["seeds"], run.smoke
    samples = (8 if smoke else 128) * len(seeds)
    common = token_aware_config(base, "E", seeds, smoke, share=SHARE)
    bank = BankConfig("operator_train" + WITH_REVIEWS, samples, prefix=128, decoded=8)
    places = [(method, trained, place) for method, trained in METHODS.items() for place in LEARNED]
    for method, trained, (bits, group) in places:
        if bits not in bits_of(run) or (trained != "steps" and (bits, group) != REPAIRED):
            continue
        # distillation alone: no sample is clean, and steps can lower a contraction ratio by doing more damage
        objectives: tuple[Objective, ...] = (RepairObjective(lambda_contr=0.0),)
        if trained == "steps" and (bits, group) == VALENCE_AT:
            objectives += (ValenceObjective(features="hidden"),)
        changes: dict[str, Any] = {"objectives": objectives, "bank": bank, "batch": BATCH[trained]}
        changes["mixture"] = Mixture({"quant_noise": 1.0}, clean_share=1.0)  # no fault but few bits
        changes["steps"] = 2 if smoke else STEPS[trained]
        yield method, replace(common, quantiser=QuantiserConfig(bits, group, trained), **changes)


def learned(run: Run, base: Base) -> dict[str, Storage]:
    """What was trained, by method (and objective), bits and group."""
    found = {}
    for method, config in conditions(run, base):
        stack = load_or_train(base, config, run.trained, run.work, run.retrain or run.smoke)
        quantisers = KVQuantiser.from_pretrained(run.trained / config.key(base)).to(base.model.device)
        names = [method, f"{method}, valence"][: len(config.objectives)]
        for number, (name, operator) in enumerate(by_condition(stack, names).items()):
            quantiser = quantisers.condition(number, len(names))
            repair = TokenRepair(base.model, operator, lossy=True) if config.repairs else None
            found[named(name, quantiser.config)] = quantised(name, quantiser, repair)
    return found


def named(method: str, config: QuantiserConfig) -> str:
    """The name of a way to store."""
    return f"{method}, {config.bits} bits, groups of {config.group}"


def untrained(run: Run, base: Base) -> dict[str, Storage]:
    """The usual cache, KIVI, fixed ranges by channel, and a code without a cache."""
    clean = calibration_of(base).clean
    found = {"16 bits": full(base)}
    for bits in bits_of(run):
        found[f"{NEAREST}, {bits} bits"] = fixed_ranges(NEAREST, bits, clean.k)
        for config in (QuantiserConfig(bits, group) for group in KIVI_GROUPS):
            quantiser = KVQuantiser.calibrated(config, clean.k[:1], clean.v[:1]).to(base.model.device)
            found[named(KIVI, config)] = quantised(KIVI, quantiser)
    _, trained = next(conditions(run, base))
    for share in ALONE:
        operator = RepairOperator.create("E", base.model.config, trained.layers, share=share).to(base.model.device)
        joint_operator(operator).set_joint(joint_of(base, trained.layers, trained.bank.source))
        found[f"{CODE}, 1/{1 / share:.0f}"] = code_alone(CODE, TokenRepair(base.model, operator, "restore"))
    return found


def scores(run: Run, base: Base, storages: Mapping[str, Storage]) -> pd.DataFrame:
    """`quantised_scores` on unseen text."""
    task = standard_tasks(base, "test", run.parameters["seeds"], {"perplexity": examples(run)})["perplexity"]
    return quantised_scores(base, task, clean_pass(base.model, task), storages, shipped_valence(base))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """KL, NLL lost and valence gap of every way to store, with 95% t intervals over seeds."""
    keys = ["storage", "method", "bits", "group", "bytes_per_token"]
    found = []
    for key, part in with_loss(rows).groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        for measure in MEASURES:
            row |= stats.t_interval(part[measure]).columns(measure)
        found.append(row | {"n_seeds": len(part), "n_examples": int(part["n_examples"].sum())})
    return pd.DataFrame(found)


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """What each method saves against others of the same bytes a token, paired over seeds: above zero it is better."""
    by_place = with_loss(rows).set_index(["method", "bits", "bytes_per_token", "seed"]).sort_index()[list(MEASURES)]
    places = rows[["method", "bits", "bytes_per_token"]].drop_duplicates().itertuples(index=False, name=None)
    found = []
    for method, bits, stored in places:
        plain, _, objective = method.partition(", ")
        others = [*AGAINST.get(plain, ()), *([plain] if objective else [])]
        for other in others:
            if (other, bits, stored) not in by_place.index:
                continue
            own, reference = by_place.loc[method, bits, stored], by_place.loc[other, bits, stored]
            row = {"method": method, "against": other, "bits": bits, "bytes_per_token": stored}
            for measure in MEASURES:
                row |= stats.paired_interval(reference[measure], own[measure]).columns(measure)
            found.append(row | {"n_seeds": len(own)})
    return pd.DataFrame(found)


def with_loss(rows: pd.DataFrame) -> pd.DataFrame:
    """With `lost`, the NLL lost against the usual cache."""
    return rows.assign(lost=rows["nll"] - rows["nll_clean"])


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    rows = scores(run, base, untrained(run, base) | learned(run, base))
    return {
        "learned_quantiser_scores": rows,
        "learned_quantiser": summary(rows),
        "learned_quantiser_paired": paired(rows),
    }
