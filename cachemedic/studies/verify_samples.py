"""The rows that `make verify` computes again: some of every notebook whose numbers do not depend on training anew.

Measured values are computed from scratch. Summaries are computed in full from the committed grid that they summarise,
which ties every number of the paper to rows that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch

from cachemedic.data.text import documentation
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense, blind_defenses
from cachemedic.evaluation import severity_calibration
from cachemedic.evaluation.experiments import ID_COLUMNS, calibration_of, run_grid, standard_tasks
from cachemedic.models.load import Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies import main_study
from cachemedic.studies.base_report import Effort, language_scores, read, retrieval
from cachemedic.studies.computing import main_results, operator_families, threat_model
from cachemedic.studies.computing.main_results import GROUPS
from cachemedic.studies.family_study import headline
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, shipped, text_grid
from cachemedic.studies.summaries import Summarise, by_group, intervals, recovery_by_type, summary
from cachemedic.studies.sweeps import defenses_of
from cachemedic.studies.verify_sample import Sample
from cachemedic.studies.verify_sweep_samples import NLL, SWEEP_SAMPLES, bounded


def base_scores(run: Run) -> pd.DataFrame:
    """Language-model scores of the second base, but for the unigram, which reads a million tokens."""
    base = load_base(run.parameters["second"])
    tasks = standard_tasks(base, "test", run.parameters["seeds"], {"perplexity": Effort().perplexity})
    uniform = torch.zeros(base.config.vocab_size)
    scores = language_scores(base, tasks["perplexity"], uniform)
    rows = [(base.name, name, i.estimate, i.low, i.high) for name, i in scores.items() if "unigram" not in name]
    return pd.DataFrame(rows, columns=["base", "measure", "estimate", "low", "high"])


def sentiment_scores(run: Run) -> pd.DataFrame:
    """Accuracies of the first base on its clean cache and on an erased one."""
    base = load_base(run.parameters["base"])
    task = standard_tasks(base, "test", run.parameters["seeds"], {"sentiment": Effort().sentiment})["sentiment"]
    means = read(base, task).groupby("reader")["correct"].mean()
    rows = [(base.name, f"sentiment accuracy, {reader}", value) for reader, value in means.items()]
    return pd.DataFrame(rows, columns=["base", "measure", "estimate"])


def needle_counts(run: Run) -> pd.DataFrame:
    """Facts found by the first base in the shortest context, at every depth."""
    base, effort = load_base(run.parameters["base"]), Effort()
    rows = retrieval(base, documentation("test"), run.parameters["seeds"], effort.needle, effort.contexts[:1])
    return rows.assign(base=base.name)


def context_values(run: Run) -> pd.DataFrame:
    """The value of the context of both bases."""
    names = (run.parameters["base"], run.parameters["second"])
    return pd.concat([threat_model.context_value(*threat_model.calibration(name, "cpu", False)) for name in names])


def damage_curves(run: Run) -> pd.DataFrame:
    """One damage curve of each base."""
    frames = []
    for parameter, kind in (("base", "bitflip_sparse"), ("second", "contiguous_overwrite")):
        base, task, clean = threat_model.calibration(run.parameters[parameter], "cpu", False)
        value = threat_model.context_value(base, task, clean)["context_value"].item()
        frames.append(severity_calibration.damage_curve(base, task, clean, kind, value).assign(base=base.name))
    return pd.concat(frames)


def grid_rows(run: Run) -> pd.DataFrame:
    """Standard setting: every blind reader and A on noisy text of one base, no defence, A, D and E on overwritten
    needles of the other."""
    first, second = base_of(run, "base"), base_of(run, "second")
    token_aware = defenses_of(second, shipped(run, second, main_results.token_aware(run, second)))
    undefended: dict[str, Defense] = {"none": NoDefense()}
    frames = []
    readers: Mapping[str, Defense]
    for base, readers, task, kind in (
        (first, blind_defenses(calibration_of(first)), "perplexity", "gaussian"),
        (second, undefended | token_aware, "needle", "contiguous_overwrite"),
    ):
        own: dict[str, Defense] = {**readers, "operator A": _operator_a(run, base)}
        tasks = standard_tasks(base, "test", run.parameters["seeds"], {task: main_study.EXAMPLES[task]})
        rows = run_grid(base, tasks, own, None, types=(kind,), severities=(0.5,))
        frames.append(rows.assign(base=base.name, setting="standard"))
    return pd.concat(frames)


def _operator_a(run: Run, base: Base) -> RepairOperator:
    standard = {"standard": main_results.linear(run, base)["standard"]}
    return shipped(run, base, standard)["standard"]


def contraction(run: Run) -> pd.DataFrame:
    """rho of operator A of the second base, standard setting, and its bounds."""
    base = base_of(run, "second")
    return main_results.rho(run, base, {"standard": _operator_a(run, base)})


def family_rows(run: Run) -> pd.DataFrame:
    """No defence, D and E on the second base, whose cache another request's was written over."""
    base = base_of(run, "second")
    configs = headline(base, run.parameters["seeds"])
    found = defenses_of(base, shipped(run, base, {name: configs[name] for name in ("D", "E")}))
    examples, kinds = operator_families.examples(run), ("contiguous_overwrite",)
    return text_grid(run, base, found, examples, types=kinds, severities=(0.5,)).assign(base=base.name)


def _summarised(keys: list[str], summarise: Summarise) -> Callable[[Run], pd.DataFrame]:
    return lambda run: by_group(run.read_csv("main_grid"), keys, summarise)


SAMPLES = (
    Sample("base_models", "language modelling of the second base", ("base", "measure"),
           {"estimate": 0.05, "low": 0.05, "high": 0.05}, base_scores),
    Sample("base_models", "sentiment of the first base", ("base", "measure"), {"estimate": 0.01}, sentiment_scores),
    Sample("base_models_needle", "the first base, shortest context", ("base", "context", "depth", "reader"),
           {"n_correct": 1.0}, needle_counts),
    Sample("context_value", "both bases", ("base",), dict.fromkeys(("nll_clean", "nll_erased", "context_value"), 2e-3),
           context_values),
    Sample("damage_curves", "a curve of each base", ("base", "type", "parameter", "share"),
           {"damage": 5e-3, "damage_se": 5e-3}, damage_curves),
    Sample("main_grid", "blind readers and operators at severity 0.5", (*GROUPS, *ID_COLUMNS),
           {**NLL, "accuracy": 0.051}, grid_rows),
    Sample("family_grid", "no defence, D and E of the second base, overwriting at severity 0.5", ("base", *ID_COLUMNS),
           NLL, family_rows),
    Sample("main_contraction", "operator A of the second base, standard setting", (*GROUPS, "type", "seed"),
           dict.fromkeys(("rho", "bound_rank", "bound_full", "rank_floor"), 2e-3), contraction),
    Sample("main_curves", "all rows, from the committed main_grid", (*GROUPS, *ID_COLUMNS[:-1]),
           bounded("score", "nll", "kl"), _summarised(GROUPS, intervals)),
    Sample("main_recovery_by_type", "all rows, from the committed main_grid", (*GROUPS, "task", "type", "reader"),
           bounded("recovery"), _summarised(GROUPS, recovery_by_type)),
    Sample("main_results", "all rows, from the committed main_grid", (*GROUPS, "task", "reader"),
           bounded("auc", "auc_gain", "recovery", "kl_recovery", "clean_regression"),
           _summarised(GROUPS, summary)),
    *SWEEP_SAMPLES,
)  # fmt: skip
