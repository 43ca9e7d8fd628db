"""Targets (notebook 09): are keys worth repairing, or values, or both?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from cachemedic.evaluation.experiments import TYPES
from cachemedic.models.load import Base
from cachemedic.repair.config import APPLY_TO
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, standard_of, text_grid, train
from cachemedic.studies.summaries import advantage, in_order, recovery_by_type, summary
from cachemedic.studies.sweeps import defenses_of
from cachemedic.training.config import TrainConfig


def conditions(run: Run, base: Base) -> dict[str, TrainConfig]:
    """Operators of keys, of values and of both, in the standard setting."""
    standard = standard_of(run, base)
    return {target: replace(standard, apply_to=target) for target in APPLY_TO}


def grid(run: Run, base: Base, operators: Mapping[str, RepairOperator], **chosen: Any) -> pd.DataFrame:
    """Every target on every type and severity, or on those `chosen` as for `text_grid`."""
    return text_grid(run, base, defenses_of(base, operators), 3 if run.smoke else 20, **chosen)


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    rows = grid(run, base, train(run, base, conditions(run, base)))
    gains = advantage(rows, "KV").drop(columns=["task", "n_seeds"])
    overall = summary(rows).merge(gains, on="reader")
    by_type = in_order(recovery_by_type(rows), "reader", ["none", *APPLY_TO])
    return {
        "kv_targets_grid": rows,
        "kv_targets_results": in_order(overall[overall.reader != "none"], "reader", APPLY_TO),
        "kv_targets_by_type": in_order(by_type[by_type.reader != "none"], "type", TYPES),
    }
