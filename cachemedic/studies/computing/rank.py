"""Rank (notebook 05): does a larger correction repair more?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.contraction import measure_contraction
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, standard_of, text_grid, train, unseen_bank
from cachemedic.studies.summaries import advantage, in_order, summary
from cachemedic.studies.sweeps import defenses_of, rank_sweep
from cachemedic.training.bank import open_bank
from cachemedic.training.config import TrainConfig

RANKS = (4, 8, 16)


def conditions(run: Run, base: Base) -> dict[str, TrainConfig]:
    """Operators that differ in their rank, in the standard setting."""
    return rank_sweep(standard_of(run, base), RANKS)


def grid(run: Run, base: Base, operators: Mapping[str, RepairOperator], **chosen: Any) -> pd.DataFrame:
    """Every rank on every type and severity, or on those `chosen` as for `text_grid`."""
    return text_grid(run, base, defenses_of(base, operators), 3 if run.smoke else 20, **chosen)


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    configs = conditions(run, base)
    operators = train(run, base, configs)
    rows = grid(run, base, operators)
    bank = open_bank(base, unseen_bank(run, 2 if run.smoke else 8))
    rho = [measure_contraction(base, configs[name], {name: operator}, bank) for name, operator in operators.items()]
    overall = summary(rows)
    gains = advantage(rows, f"rank {RANKS[0]}").drop(columns=["task", "n_seeds"])
    overall = in_order(overall[overall.reader != "none"].merge(gains, on="reader"), "reader", operators)
    sizes = {name: sum(p[0].numel() for p in operator.parameters()) for name, operator in operators.items()}
    overall["parameters"] = overall.reader.map(sizes)
    return {"rank_grid": rows, "rank_rho": pd.concat(rho, ignore_index=True), "rank_results": overall}
