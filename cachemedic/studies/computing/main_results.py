"""Main results (notebook 03): what a repair brings back, on both bases."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies import main_study, summaries
from cachemedic.studies.contraction import measure_contraction
from cachemedic.studies.family_evaluation import code_alone, token_repairs
from cachemedic.studies.family_study import headline
from cachemedic.studies.run import Run
from cachemedic.studies.setting import bases_of, unseen_bank
from cachemedic.studies.sweeps import trained
from cachemedic.token.token_recompute import TokenRecompute
from cachemedic.training.bank import open_bank
from cachemedic.training.config import TrainConfig

TOKEN_AWARE = ("D", "E")
GROUPS = ["base", "setting"]


def linear(run: Run, base: Base) -> dict[str, TrainConfig]:
    """Operator A of each setting, one run a seed."""
    return main_study.linear_configs(base, run.parameters["seeds"], run.smoke)


def token_aware(run: Run, base: Base) -> dict[str, TrainConfig]:
    """The headline operators of the family study."""
    study = headline(base, run.parameters["seeds"], run.smoke)
    return {f"operator {family}": study[family] for family in TOKEN_AWARE}


def rho(run: Run, base: Base, operators: Mapping[str, RepairOperator]) -> pd.DataFrame:
    """The contraction ratio of operator A, by setting, at severity 0.5 on the test split, and its bounds."""
    bank, configs = open_bank(base, unseen_bank(run, 4 if run.smoke else 16)), linear(run, base)
    parts = []
    for setting, operator in operators.items():
        rows = measure_contraction(base, configs[setting], {"operator A": operator}, bank)
        parts.append(rows.assign(base=base.name, setting=setting))
    return pd.concat(parts)


def results(run: Run) -> dict[str, pd.DataFrame]:
    bases, seeds = bases_of(run), run.parameters["seeds"]
    operators = {name: trained(base, linear(run, base), run, run.smoke) for name, base in bases.items()}
    measured = {}
    for name, base in bases.items():
        found = token_repairs(base, token_aware(run, base), run)
        baselines = {"operator E, code alone": code_alone(found["operator E"]), "recompute": TokenRecompute(base.model)}
        measured[name] = main_study.measure(base, operators[name], found | baselines, seeds, run.partial, run.smoke)
    grid = pd.concat([m.grid.assign(base=name) for name, m in measured.items()], ignore_index=True)
    grid = grid[[*GROUPS, *grid.columns.drop(GROUPS)]]
    kept = pd.concat([m.kept.assign(base=name) for name, m in measured.items()])
    overall = summaries.by_group(grid, GROUPS, summaries.summary).merge(kept, on=["base", "reader"])
    chosen = {name: m.heuristic for name, m in measured.items()}
    overall["best_heuristic"] = overall.reader == overall.base.map(chosen)
    return {
        "main_grid": grid,
        "main_curves": summaries.by_group(grid, GROUPS, summaries.intervals),
        "main_recovery_by_type": summaries.by_group(grid, GROUPS, summaries.recovery_by_type),
        "main_results": overall,
        "main_contraction": pd.concat([rho(run, base, operators[name]) for name, base in bases.items()]),
    }
