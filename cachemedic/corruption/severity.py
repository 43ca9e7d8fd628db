"""The severity axis: damage as a share of the value of the context, looked up in the calibrated map.

s = (NLL on the corrupted cache - NLL on the clean one) / (NLL with the prefix erased - NLL on the clean one), means
over the scored tokens of the calibration split with all layers, heads and past positions exposed. s = 0 is the
identity; at s = 1 the corrupted cache is worth as much as none.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from cachemedic.core.files import write_atomically
from cachemedic.corruption.types import TYPES, check_type

MAP = Path(__file__).parent / "severity_map.csv"
GRID = (0.1, 0.25, 0.5, 1.0)  # and 0, the identity
MAP_COLUMNS = ["base", "layers", "heads", "type", "severity", "parameter", "share", "reach"]
_in_use: list[pd.DataFrame] = []  # the map set by `use_map`, if any


def use_map(rows: pd.DataFrame) -> None:
    """From now on, in this process, severities are read off `rows` (columns `MAP_COLUMNS`), not off the shipped map.

    Raises `ValueError` for a map that is cut: columns, numbers, or severities of `GRID` up to the reach are missing.
    """
    _in_use[:] = [_checked(rows)]
    reach.cache_clear()
    resolve.cache_clear()


def load_map() -> pd.DataFrame:
    """The map in use: that of `use_map`, else the one that ships for the embedded bases.

    Raises `ValueError` if the shipped one is missing or damaged.
    """
    if not _in_use:
        _in_use.append(_shipped())
    return _in_use[0]


def _shipped() -> pd.DataFrame:
    try:
        return _checked(pd.read_csv(MAP))
    except (OSError, ValueError) as error:
        raise ValueError(f"{MAP} is missing or damaged, restore it with `git checkout`: {error}") from error


def _checked(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, from the mildest severity on; `ValueError` unless the map is whole."""
    if missing := [name for name in MAP_COLUMNS if name not in rows]:
        raise ValueError(f"a severity map needs the columns {', '.join(MAP_COLUMNS)}; {', '.join(missing)} are missing")
    for row in rows[MAP_COLUMNS].itertuples(index=False):
        numbers = pd.to_numeric(pd.Series(row[4:]), errors="coerce")
        parameter, share = numbers[1:3]
        known = row.type in TYPES and pd.notna(row.base) and row.layers >= 1 and row.heads >= 1
        if not (known and 0 < numbers[0] <= numbers[3] <= 1 and 0 <= share <= 1 and 0 <= parameter < np.inf):
            raise ValueError(f"row {', '.join(map(str, row))} of the severity map is damaged (columns {MAP_COLUMNS})")
    rows = rows.sort_values("severity", kind="stable")
    for (base, kind), part in rows.groupby(["base", "type"]):
        found, limit = part["severity"].tolist(), part["reach"].iloc[0]
        needed = [s for s in GRID if s < limit] + [limit]
        lacking = [s for s in needed if not np.isclose(found, s).any()]
        if lacking or len(part[["layers", "heads", "reach"]].drop_duplicates()) > 1 or len(set(found)) < len(found):
            what = f"has no row for severity {lacking[0]:g}" if lacking else "holds rows that do not belong together"
            raise ValueError(f"the severity map {what} of {kind} on {base}: up to its reach, {limit:g}, one row each")
    return rows


def write_map(rows: pd.DataFrame) -> None:
    """Replaces the rows of the bases in `rows` in the shipped map, and uses it."""
    kept = [_shipped()] if MAP.exists() else []
    merged = pd.concat([frame[~frame["base"].isin(rows["base"])] for frame in kept] + [rows[MAP_COLUMNS]])
    merged = merged.sort_values(["base", "type", "severity"], kind="stable")
    write_atomically(MAP, merged.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())
    use_map(_shipped())


def recalibrated(base: str | None, shape: tuple[int, int, int]) -> str:
    """A digest of the rows in use for a base (see `reach`); empty if there are none, or the shipped ones within 1%."""
    try:
        used = _fitting(base, shape)
    except ValueError:  # whoever draws a severity will hear of it
        return ""
    shipped = _shipped()
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
    if not limit:
        raise ValueError(f"{corruption} is not calibrated for {base or 'this base'}: give parameter=...")
    if not 0 < severity <= limit:
        raise ValueError(f"severity {severity!r} of {corruption} is out of range: from 0 to {limit} on this base")
    above = rows[rows["severity"] >= severity].iloc[0]
    if corruption == "quant_noise":
        return float(above["parameter"]), float(above["share"] * severity / above["severity"])
    parameter = np.interp(severity, [0.0, *rows["severity"]], [0.0, *rows["parameter"]])
    return float(parameter), float(above["share"])
