"""Contraction (notebook 04): does the contraction term contract, and does that help?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.contraction import measure_contraction
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, severities_of, standard_of, text_grid, train, unseen_bank
from cachemedic.studies.summaries import advantage, by_group, in_order, means_over_seeds, summary
from cachemedic.studies.sweeps import block, contraction_sweep, defenses_of
from cachemedic.training.bank import open_bank
from cachemedic.training.config import TrainConfig

STEPS = 200
STANDARD, TWO_LAYERS = "standard, rank 8", "two layers, full rank"
DEFAULT, WITHOUT, ALONE = "lambda 0.5, alpha 0.8", "lambda 0, alpha 0.8", "contraction alone"
MEASURES = ("rho", "bound_rank", "bound_full", "shared_rank", "shared_full", "rank_floor")


def settings(run: Run, base: Base) -> dict[str, TrainConfig]:
    """What the conditions of each setting vary: all layers, and two in the middle with maps of full rank."""
    standard, depth = standard_of(run, base, STEPS), base.config.num_hidden_layers
    full_rank = ModelShape.of(base.model.config).head_dim
    two_layers = replace(standard, layers=block(depth, 2, "mid"), corrupted_layers="protected", rank=full_rank)
    return {STANDARD: standard, TWO_LAYERS: two_layers}


def conditions(run: Run, base: Base, setting: str = STANDARD) -> dict[str, TrainConfig]:
    """The sweep of a setting; of two layers, the default and the term alone."""
    sweep = contraction_sweep(settings(run, base)[setting])
    return sweep if setting == STANDARD else {name: sweep[name] for name in (DEFAULT, ALONE)}


def grid(run: Run, base: Base, setting: str, operators: Mapping[str, RepairOperator], **chosen: Any) -> pd.DataFrame:
    """The operators of a setting on every type and severity, or on those `chosen` as for `text_grid`."""
    hit = "all" if setting == STANDARD else settings(run, base)[setting].layers
    readers = defenses_of(base, operators)
    return text_grid(run, base, readers, 3 if run.smoke else 20, setting, hit, **chosen).assign(setting=setting)


def rho(
    run: Run, base: Base, setting: str, operators: Mapping[str, RepairOperator], severities: tuple[float, ...]
) -> pd.DataFrame:
    """Whether the operators of a setting contract, on texts of the test split."""
    bank = open_bank(base, unseen_bank(run, 2 if run.smoke else 8))
    rows = measure_contraction(base, settings(run, base)[setting], operators, bank, severities)
    return rows.assign(setting=setting)


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    operators = {setting: train(run, base, conditions(run, base, setting)) for setting in settings(run, base)}
    rows = pd.concat([grid(run, base, setting, own) for setting, own in operators.items()], ignore_index=True)
    overall = in_order(by_group(rows, ["setting"], summary), "reader", ["none", *operators[STANDARD]])
    gains = advantage(rows[rows.setting == STANDARD], WITHOUT)
    left = [rho(run, base, setting, own, severities_of(run)) for setting, own in operators.items()]
    left = pd.concat(left, ignore_index=True)
    return {
        "contraction_grid": rows,
        "contraction_results": in_order(overall, "setting", operators),
        "contraction_advantage": gains[gains.reader != "none"].assign(reference=WITHOUT),
        "contraction_rho": left,
        "contraction_curves": means_over_seeds(left, ["setting", "condition", "type", "severity"], MEASURES),
    }
