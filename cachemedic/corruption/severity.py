"""The severity axis: damage as a share of the value of the context.

s = (NLL on the corrupted cache - NLL on the clean one) / (NLL with the prefix erased - NLL on the clean one), means
over the scored tokens of the calibration split with all layers, heads and past positions exposed. s = 0 is the
identity; at s = 1 the corrupted cache is worth as much as none. A `SeverityMap` tells the parameter of a severity; the
one that ships serves the embedded bases.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import pandas as pd

from cachemedic.core.files import read_hashed, write_hashed
from cachemedic.core.severity_map import MAP_COLUMNS, SeverityMap

MAP = Path(__file__).parent / "severity_map.csv"


@cache
def shipped_map() -> SeverityMap:
    """The map that ships for the embedded bases. Raises `ValueError` if it is missing or damaged."""
    try:
        return SeverityMap(pd.read_csv(io.BytesIO(read_hashed(MAP))))
    except (OSError, ValueError) as error:
        raise ValueError(f"{MAP} is missing or damaged, restore it with `git checkout`: {error}") from error


def write_map(rows: pd.DataFrame) -> None:
    """Replaces the rows of the bases in `rows` in the shipped map."""
    shipped_map.cache_clear()
    kept = [shipped_map().rows] if MAP.exists() else []
    merged = pd.concat([frame[~frame["base"].isin(rows["base"])] for frame in kept] + [rows[MAP_COLUMNS]])
    merged = merged.sort_values(["base", "type", "severity"], kind="stable")
    write_hashed(MAP, merged.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())
    shipped_map.cache_clear()
