"""The rows that `make verify` computes again: some of every notebook whose numbers do not depend on training anew.

Measured values are computed from scratch. Summaries are computed in full from the committed grid that they summarise,
which ties every number of the paper to rows that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import pandas as pd
import torch

from cachemedic.data.task_data import TaskData
from cachemedic.data.text import documentation
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense, blind_defenses
from cachemedic.evaluation import severity_calibration
from cachemedic.evaluation.decoding import CleanBank, clean_pass
from cachemedic.evaluation.experiments import ID_COLUMNS, calibration_of, run_grid, standard_tasks
from cachemedic.models.load import Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.base_report import Effort, language_scores, read, retrieval
from cachemedic.studies.contraction import measure_contraction
from cachemedic.studies.family_study import headline
from cachemedic.studies.main_study import linear_configs
from cachemedic.studies.report import ROOT
from cachemedic.studies.summaries import Summarise, by_group, intervals, recovery_by_type, summary
from cachemedic.studies.sweeps import defenses_of
from cachemedic.studies.verify import Parameters, Sample
from cachemedic.studies.verify_sweep_samples import NLL, SWEEP_SAMPLES, bounded, calibrated_base
from cachemedic.training.bank import BankConfig, open_bank
from cachemedic.training.config import TrainConfig

GROUPS = ["base", "setting"]


@cache
def _calibration(name: str, n: int) -> tuple[Base, TaskData, CleanBank]:
    base = load_base(name)
    task = standard_tasks(base, "calibration", [0], {"perplexity": n})["perplexity"]
    return base, task, clean_pass(base.model, task)


def base_scores(parameters: Parameters) -> pd.DataFrame:
    """Language-model scores of the second base, but for the unigram, which reads a million tokens."""
    base = load_base(parameters["second"])
    tasks = standard_tasks(base, "test", parameters["seeds"], {"perplexity": Effort().perplexity})
    uniform = torch.zeros(base.model.config.vocab_size)
    scores = language_scores(base, tasks["perplexity"], uniform)
    rows = [(base.name, name, i.estimate, i.low, i.high) for name, i in scores.items() if "unigram" not in name]
    return pd.DataFrame(rows, columns=["base", "measure", "estimate", "low", "high"])


def sentiment_scores(parameters: Parameters) -> pd.DataFrame:
    """Accuracies of the first base on its clean cache and on an erased one."""
    base = load_base(parameters["base"])
    task = standard_tasks(base, "test", parameters["seeds"], {"sentiment": Effort().sentiment})["sentiment"]
    means = read(base, task).groupby("reader")["correct"].mean()
    rows = [(base.name, f"sentiment accuracy, {reader}", value) for reader, value in means.items()]
    return pd.DataFrame(rows, columns=["base", "measure", "estimate"])


def needle_counts(parameters: Parameters) -> pd.DataFrame:
    """Facts found by the first base in the shortest context, at every depth."""
    base, effort = load_base(parameters["base"]), Effort()
    rows = retrieval(base, documentation("test"), parameters["seeds"], effort.needle, effort.contexts[:1])
    return rows.assign(base=base.name)


def context_values(parameters: Parameters) -> pd.DataFrame:
    """The value of the context of both bases."""
    rows = []
    for name in (parameters["base"], parameters["second"]):
        erased = severity_calibration.context_value(*_calibration(name, 96))
        clean, without = erased["nll_clean"].mean(), erased["nll_erased"].mean()
        rows.append((name, clean, without, without - clean))
    return pd.DataFrame(rows, columns=["base", "nll_clean", "nll_erased", "context_value"])


def damage_curves(parameters: Parameters) -> pd.DataFrame:
    """One damage curve of each base."""
    frames = []
    for name, kind in ((parameters["base"], "bitflip_sparse"), (parameters["second"], "contiguous_overwrite")):
        base, task, clean = _calibration(name, 96)
        erased = severity_calibration.context_value(base, task, clean)
        value = (erased["nll_erased"] - erased["nll_clean"]).mean()
        frames.append(severity_calibration.damage_curve(base, task, clean, kind, value).assign(base=name))
    return pd.concat(frames)


def _operator(base: Base, config: TrainConfig) -> RepairOperator:
    return RepairOperator.from_pretrained(ROOT / "trained" / config.key(base))


def grid_rows(parameters: Parameters) -> pd.DataFrame:
    """Standard setting: every blind reader and A on noisy text of one base, no defence, A, D and E on overwritten
    needles of the other."""
    first, second = (calibrated_base(parameters[name]) for name in ("base", "second"))
    blind = blind_defenses(calibration_of(first))
    study = headline(second, parameters["seeds"])
    token_aware = defenses_of(second, {f"operator {family}": _operator(second, study[family]) for family in ("D", "E")})
    undefended: dict[str, Defense] = {"none": NoDefense()}
    frames = []
    readers: Mapping[str, Defense]
    for base, readers, task, kind, n in (
        (first, blind, "perplexity", "gaussian", 8),
        (second, undefended | token_aware, "needle", "contiguous_overwrite", 4),
    ):
        linear = linear_configs(base, parameters["seeds"])["standard"]
        own: dict[str, Defense] = {**readers, "operator A": _operator(base, linear)}
        tasks = standard_tasks(base, "test", parameters["seeds"], {task: n})
        rows = run_grid(base, tasks, own, None, types=(kind,), severities=(0.5,))
        frames.append(rows.assign(base=base.name, setting="standard"))
    return pd.concat(frames)


def contraction(parameters: Parameters) -> pd.DataFrame:
    """rho of operator A of the second base, standard setting, and its bounds."""
    base = calibrated_base(parameters["second"])
    config = linear_configs(base, parameters["seeds"])["standard"]
    bank = open_bank(base, BankConfig(split="test", samples=16 * len(config.seeds)))
    rows = measure_contraction(base, config, {"operator A": _operator(base, config)}, bank)
    return rows.assign(base=base.name, setting="standard")


def family_rows(parameters: Parameters) -> pd.DataFrame:
    """No defence, D and E on the second base, whose cache another request's was written over."""
    base, seeds = calibrated_base(parameters["second"]), parameters["seeds"]
    configs = headline(base, seeds)
    found = defenses_of(base, {name: _operator(base, configs[name]) for name in ("D", "E")})
    tasks = standard_tasks(base, "test", seeds, {"perplexity": 5})
    readers: dict[str, Defense] = {"none": NoDefense(), **found}
    rows = run_grid(base, tasks, readers, None, types=("contiguous_overwrite",), severities=(0.5,))
    return rows.assign(base=base.name)


def _summarised(keys: list[str], summarise: Summarise) -> Callable[[Parameters], pd.DataFrame]:
    return lambda parameters: by_group(pd.read_csv(ROOT / "results" / "main_grid.csv"), keys, summarise)


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
