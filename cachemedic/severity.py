"""The severity axis: damage as a share of the value of the context, and the calibrated map to each type's parameter.

s = (NLL on the corrupted cache - NLL on the clean one) / (NLL with the prefix erased - NLL on the clean one), means
over the scored tokens of the calibration split with all layers, heads and past positions exposed. s = 0 is the
identity; at s = 1 the corrupted cache is worth as much as none.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cachemedic.corruption_spec import CALIBRATED_POSITIONS, CorruptionSpec
from cachemedic.corruption_types import NONE, check_type
from cachemedic.decoding import CleanBank
from cachemedic.defenses import NoDefence, Reset
from cachemedic.evaluate import evaluate
from cachemedic.files import write_atomically
from cachemedic.models import Base
from cachemedic.task_data import TaskData

MAP = Path(__file__).parent / "severity_map.csv"
GRID = (0.1, 0.25, 0.5, 1.0)  # and 0, the identity
PARAMETERS: dict[str, tuple[float, ...]] = {
    "gaussian": (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 8.0),
    "dropout_zero": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    "orthogonal_rotation": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0),
    "bitflip_sparse": (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6),
    "quant_noise": (8, 6, 5, 4, 3, 2, 1),
    "contiguous_overwrite": (4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128),
}
SHARES = (0.05, 0.15, 0.3, 0.6, 1.0)  # of the positions, where the parameter is discrete


MAP_COLUMNS = ["base", "layers", "heads", "type", "severity", "parameter", "share", "reach"]


def context_value(base: Base, task: TaskData, clean: CleanBank) -> pd.DataFrame:
    """NLL with and without the prefix, one row per example: columns seed, nll_clean, nll_erased (nats per token)."""
    scores = evaluate(base.model, task, clean, CorruptionSpec(NONE), {"erased": Reset()})
    return scores[["seed", "nll_clean", "nll"]].rename(columns={"nll": "nll_erased"})


def damage_curve(base: Base, task: TaskData, clean: CleanBank, corruption: str, value: float) -> pd.DataFrame:
    """The damage of one type at every calibration parameter: columns type, parameter, share, damage, damage_se.

    `value` is the mean value of the context of `task` in nats per token; the standard error is over examples.
    """
    rows = []
    for parameter in PARAMETERS[corruption]:
        for share in SHARES if corruption == "quant_noise" else (1.0,):
            spec = CorruptionSpec(corruption, parameter=parameter, share=share)
            scores = evaluate(base.model, task, clean, spec, {"none": NoDefence()})
            lost = (scores["nll"] - scores["nll_clean"]) / value
            rows.append((corruption, parameter, share, lost.mean(), lost.sem()))
    return pd.DataFrame(rows, columns=["type", "parameter", "share", "damage", "damage_se"])


def calibrate(base: Base, task: TaskData, clean: CleanBank) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curves of all types (`damage_curve`) and the severity map read off them (columns `MAP_COLUMNS`).

    A type whose damage stays below a severity of the grid ends in a row at its reach.
    Raises `ValueError` if the prefixes have not the length of calibration, or if the base makes no use of them.
    """
    if clean.k.shape[3] != CALIBRATED_POSITIONS:
        raise ValueError(f"calibrate on prefixes of {CALIBRATED_POSITIONS} tokens, not of {clean.k.shape[3]}")
    erased = context_value(base, task, clean)
    value = (erased["nll_erased"] - erased["nll_clean"]).mean()
    if not value > 0:
        raise ValueError(f"the context of {task.name} is worth {value:.3f} nats to {base.name}: nothing can be damaged")
    bar = tqdm(PARAMETERS, desc=f"severity calibration of {base.name}")
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


_in_use: list[pd.DataFrame] = []  # the map set by `use_map`, if any


def use_map(rows: pd.DataFrame) -> None:
    """From now on, in this process, severities are read off `rows` (columns `MAP_COLUMNS`), not off the shipped map."""
    _in_use[:] = [rows]
    reach.cache_clear()
    resolve.cache_clear()


def load_map() -> pd.DataFrame:
    """The map in use: that of `use_map`, else the one that ships for the embedded bases."""
    if not _in_use:
        _in_use.append(pd.read_csv(MAP))
    return _in_use[0]


def write_map(rows: pd.DataFrame) -> None:
    """Replaces the rows of the bases in `rows` in the shipped map, and uses it."""
    kept = [pd.read_csv(MAP)] if MAP.exists() else []
    merged = pd.concat([frame[~frame["base"].isin(rows["base"])] for frame in kept] + [rows[MAP_COLUMNS]])
    merged = merged.sort_values(["base", "type", "severity"], kind="stable")
    write_atomically(MAP, merged.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())
    use_map(pd.read_csv(MAP))


def recalibrated(base: str | None, shape: tuple[int, int, int]) -> str:
    """A digest of the rows in use for a base (see `reach`); empty if there are none, or the shipped ones within 1%."""
    try:
        used = _fitting(base, shape)
    except ValueError:  # whoever draws a severity will hear of it
        return ""
    shipped = pd.read_csv(MAP)
    shipped = shipped[shipped["base"].isin(used["base"])]
    used, shipped = (rows.sort_values(["type", "severity"])[MAP_COLUMNS[3:]] for rows in (used, shipped))
    kinds, numbers = MAP_COLUMNS[3], MAP_COLUMNS[4:]
    if list(used[kinds]) == list(shipped[kinds]) and np.allclose(used[numbers], shipped[numbers], rtol=0.01):
        return ""
    return hashlib.sha256(used.to_csv(index=False, float_format="%.3g").encode()).hexdigest()


def _rows(corruption: str, base: str | None, shape: tuple[int, int, int]) -> pd.DataFrame:
    check_type(corruption)
    fitting = _fitting(base, shape)
    return fitting[fitting["type"] == corruption]


def _fitting(base: str | None, shape: tuple[int, int, int]) -> pd.DataFrame:
    calibrated = load_map()
    if base is None:
        fitting = calibrated[(calibrated["layers"] == shape[0]) & (calibrated["heads"] == shape[1])]
        if fitting["base"].nunique() != 1:
            raise ValueError(
                f"no single calibrated base has {shape[0]} layers and {shape[1]} key/value heads; give parameter=..., "
                f"or base= one of {', '.join(calibrated['base'].unique())}"
            )
    else:
        fitting = calibrated[calibrated["base"] == base]
        if fitting.empty:
            raise ValueError(
                f"severity is not calibrated for base {base!r}; give parameter=..., or base= one of "
                f"{', '.join(calibrated['base'].unique())}"
            )
    return fitting


@cache
def reach(corruption: str, base: str | None, shape: tuple[int, int, int]) -> float:
    """The largest severity up to 1 that a type reaches on a base (None: the one whose caches have `shape` L, G, T)."""
    rows = _rows(corruption, base, shape)
    return float(rows["reach"].iloc[0]) if len(rows) else 0.0


@cache
def resolve(corruption: str, severity: float, base: str | None, shape: tuple[int, int, int]) -> tuple[float, float]:
    """Parameter and share of positions for a severity; between rows of the map it interpolates.

    Raises `ValueError` beyond the type's reach, or where no calibrated base fits.
    """
    rows = _rows(corruption, base, shape)
    limit = reach(corruption, base, shape)
    if not 0 < severity <= limit:
        raise ValueError(f"severity {severity!r} of {corruption} is out of range: from 0 to {limit} on this base")
    above = rows[rows["severity"] >= severity].iloc[0]
    if corruption == "quant_noise":
        return float(above["parameter"]), float(above["share"] * severity / above["severity"])
    parameter = np.interp(severity, [0.0, *rows["severity"]], [0.0, *rows["parameter"]])
    return float(parameter), float(above["share"])
