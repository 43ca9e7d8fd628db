"""Measures how much damage each corruption type does at each parameter, and reads the severity map off these curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cachemedic.core.progress import tqdm
from cachemedic.core.severity_map import GRID, MAP_COLUMNS
from cachemedic.corruption.spec import CALIBRATED_POSITIONS, CorruptionSpec
from cachemedic.corruption.types import CORRUPTIONS, NONE
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.heuristics import NoDefense, Reset
from cachemedic.evaluation.decoding import CleanBank
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.models.load import Base

SHARES = (0.05, 0.15, 0.3, 0.6, 1.0)  # of the positions, where the parameter is discrete


def context_value(base: Base, task: TaskData, clean: CleanBank) -> pd.DataFrame:
    """NLL with and without the prefix, one row per example: columns seed, nll_clean, nll_erased (nats per token)."""
    scores = evaluate(base.model, task, clean, CorruptionSpec(NONE), {"erased": Reset()})
    return scores[["seed", "nll_clean", "nll"]].rename(columns={"nll": "nll_erased"})


def damage_curve(base: Base, task: TaskData, clean: CleanBank, corruption: str, value: float) -> pd.DataFrame:
    """The damage of one type at every calibration parameter: columns type, parameter, share, damage, damage_se.

    `value` is the mean value of the context of `task` in nats per token; the standard error is over examples.
    """
    rows = []
    for parameter in CORRUPTIONS[corruption].calibration:
        for share in SHARES if CORRUPTIONS[corruption].by_share else (1.0,):
            spec = CorruptionSpec(corruption, parameter=parameter, share=share)
            scores = evaluate(base.model, task, clean, spec, {"none": NoDefense()})
            lost = (scores["nll"] - scores["nll_clean"]) / value
            rows.append((corruption, parameter, share, lost.mean(), lost.sem()))
    return pd.DataFrame(rows, columns=["type", "parameter", "share", "damage", "damage_se"])


def calibrate_severities(
    base: Base, task: TaskData, clean: CleanBank, types: Sequence[str] = ()
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curves of corruption types (`damage_curve`), and the rows of a `SeverityMap` read off them.

    types: which ones (none: all that have parameters of calibration).
    A type whose damage stays below a severity of the grid ends in a row at its reach.
    Raises `ValueError` if the prefixes have not the length of calibration, or if the base makes no use of them.
    """
    if clean.k.shape[3] != CALIBRATED_POSITIONS:
        raise ValueError(f"calibrate on prefixes of {CALIBRATED_POSITIONS} tokens, not of {clean.k.shape[3]}")
    erased = context_value(base, task, clean)
    value = (erased["nll_erased"] - erased["nll_clean"]).mean()
    if not value > 0:
        raise ValueError(f"the context of {task.name} is worth {value:.3f} nats to {base.name}: nothing can be damaged")
    types = types or [name for name, corruption in CORRUPTIONS.items() if corruption.calibration]
    bar = tqdm(types, desc=f"severity calibration of {base.name}")
    curves = [damage_curve(base, task, clean, corruption, value) for corruption in bar]
    layers, heads = clean.k.shape[1:3]
    rows = [(base.name, layers, heads, curve["type"][0], *row) for curve in curves for row in _read_off(curve)]
    return pd.concat(curves, ignore_index=True), pd.DataFrame(rows, columns=MAP_COLUMNS)


def _read_off(curve: pd.DataFrame) -> list[tuple[float, float, float, float]]:
    """Severity, parameter, share and reach for each severity of the grid that a damage curve reaches."""
    whole = curve[curve["share"] == 1.0]
    damage = np.maximum.accumulate(whole["damage"].to_numpy().clip(0))
    parameters = whole["parameter"].to_numpy()
    reach = math.floor(damage[-1] * 1000) / 1000  # not above what was measured
    reached = [s for s in GRID if s <= reach]
    if len(reached) < len(GRID) and reach > (reached[-1] if reached else 0.0):
        reached.append(reach)
    rows = []
    for severity in reached:
        i = int(np.searchsorted(damage, severity))  # the mildest parameter that does at least this damage
        i = min(i, len(damage) - 1)
        if (curve["share"] < 1).any():  # discrete: this parameter on a share of the positions
            shares = curve[curve["parameter"] == parameters[i]]
            done = np.maximum.accumulate(shares["damage"].to_numpy().clip(0))
            share = float(np.interp(severity, [0.0, *done], [0.0, *shares["share"]]))
            rows.append((severity, float(parameters[i]), share, min(reach, GRID[-1])))
        else:
            known = [0.0, *damage] if i == 0 else list(damage[i - 1 : i + 1])
            grid = [0.0, *parameters] if i == 0 else list(parameters[i - 1 : i + 1])
            rows.append((severity, float(np.interp(severity, known, grid)), 1.0, min(reach, GRID[-1])))
    return rows
