"""A table from severities to the parameters of corruption types, base by base."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import cache, partial

import numpy as np
import pandas as pd

from cachemedic.core.errors import check_given

MAP_COLUMNS = ["base", "layers", "heads", "type", "severity", "parameter", "share", "reach"]
GRID = (0.1, 0.25, 0.5, 1.0)  # the severities of which a map has rows, and of which the studies are made; and 0
Shape = tuple[int, int, int]  # L layers, G key/value heads, T positions of a cache


class SeverityMap:
    """Looks up what a severity stands for; `rows` is a frame with the columns `MAP_COLUMNS`.

    Calibration measures the rows: at `parameter`, on `share` of the positions, a type does the damage `severity` on a
    base of so many layers and key/value heads, and `reach` is the largest severity up to 1 that the type reaches there.
    A base is given by its name, or (None) as the only one whose caches have the shape. Raises `ValueError` where no
    such base is calibrated, and for a map that is cut or damaged: columns, numbers, or severities of `GRID` up to the
    reach are missing.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = _checked(rows)
        self.reach = cache(self._reach)  # asked for every sample of a training step
        self.resolve = cache(self._resolve)

    def _reach(self, corruption: str, base: str | None, shape: Shape) -> float:
        """The largest severity up to 1 that a type reaches; 0 if the type is not calibrated."""
        rows = self._of_type(corruption, base, shape)
        return float(rows["reach"].iloc[0]) if len(rows) else 0.0

    def _resolve(
        self, corruption: str, severity: float, base: str | None, shape: Shape, by_share: bool
    ) -> tuple[float, float]:
        """Parameter and share of positions; between rows of the map it interpolates the parameter, or, `by_share`, the
        share. Raises `ValueError` beyond the type's reach.
        """
        rows = self._of_type(corruption, base, shape)
        if rows.empty:
            raise ValueError(
                f"the severity of {corruption} is not calibrated on this base, got severity={severity!r}: give "
                "parameter=..., or calibrate it (cachemedic.evaluation.severity_calibration)"
            )
        limit = self.reach(corruption, base, shape)
        if not 0 < severity <= limit:
            raise ValueError(f"severity {severity!r} of {corruption} is out of range: from 0 to {limit} on this base")
        above = rows[rows["severity"] >= severity].iloc[0]
        if by_share:
            return float(above["parameter"]), float(above["share"] * severity / above["severity"])
        parameter = np.interp(severity, [0.0, *rows["severity"]], [0.0, *rows["parameter"]])
        return float(parameter), float(above["share"])

    def digest_beside(self, other: SeverityMap, types: Collection[str], base: str | None, shape: Shape) -> str:
        """A digest of the rows of a base and of `types`; empty if there are none, or those of `other` within 1%."""
        try:
            own = self._of_base(base, shape)
        except ValueError:  # whoever draws a severity will hear of it
            return ""
        own = own[own["type"].isin(types)]
        reference = other.rows[other.rows["base"].isin(own["base"]) & other.rows["type"].isin(types)]
        own, reference = (rows.sort_values(["type", "severity"])[MAP_COLUMNS[3:]] for rows in (own, reference))
        kinds, numbers = MAP_COLUMNS[3], MAP_COLUMNS[4:]
        if list(own[kinds]) == list(reference[kinds]) and np.allclose(own[numbers], reference[numbers], rtol=0.01):
            return ""
        return hashlib.sha256(own.to_csv(index=False, float_format="%.3g").encode()).hexdigest()

    def _of_type(self, corruption: str, base: str | None, shape: Shape) -> pd.DataFrame:
        rows = self._of_base(base, shape)
        return rows[rows["type"] == corruption]

    def _of_base(self, base: str | None, shape: Shape) -> pd.DataFrame:
        known = ", ".join(self.rows["base"].unique())
        if base is not None:
            found = self.rows[self.rows["base"] == base]
            if found.empty:
                raise ValueError(
                    f"severity is not calibrated for base {base!r}; give parameter=..., or base= one of {known}"
                )
            return found
        found = self.rows[(self.rows["layers"] == shape[0]) & (self.rows["heads"] == shape[1])]
        if found["base"].nunique() != 1:
            raise ValueError(
                f"no single calibrated base has {shape[0]} layers and {shape[1]} key/value heads; give parameter=..., "
                f"or base= one of {known}"
            )
        return found


def _checked(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, from the mildest severity on; `ValueError` unless the map is whole."""
    check_given("the rows of a severity map", rows, pd.DataFrame)
    if missing := [name for name in MAP_COLUMNS if name not in rows]:
        raise ValueError(f"a severity map needs the columns {', '.join(MAP_COLUMNS)}; {', '.join(missing)} are missing")
    rows = rows[MAP_COLUMNS].sort_values("severity", kind="stable", key=partial(pd.to_numeric, errors="coerce"))
    numbers = rows.drop(columns=["base", "type"]).apply(pd.to_numeric, errors="coerce")
    sound = rows[["base", "type"]].notna().all(axis=1) & (numbers[["layers", "heads"]] >= 1).all(axis=1)
    sound &= (numbers["severity"] > 0) & (numbers["severity"] <= numbers["reach"]) & (numbers["reach"] <= 1)
    sound &= numbers["share"].between(0, 1) & (numbers["parameter"] >= 0) & (numbers["parameter"] < np.inf)
    for row in rows[~sound].itertuples(index=False):
        raise ValueError(f"row {', '.join(map(str, row))} of the severity map is damaged (columns {MAP_COLUMNS})")
    if rows.empty:
        raise ValueError("the severity map holds no row")
    rows = rows.assign(**numbers)
    for (base, kind), part in rows.groupby(["base", "type"]):
        found, limit = part["severity"].tolist(), part["reach"].iloc[0]
        needed = [s for s in GRID if s < limit] + [limit]
        lacking = [s for s in needed if not np.isclose(found, s).any()]
        if lacking or len(part[["layers", "heads", "reach"]].drop_duplicates()) > 1 or len(set(found)) < len(found):
            what = f"has no row for severity {lacking[0]:g}" if lacking else "holds rows that do not belong together"
            raise ValueError(f"the severity map {what} of {kind} on {base}: up to its reach, {limit:g}, one row each")
    return rows
