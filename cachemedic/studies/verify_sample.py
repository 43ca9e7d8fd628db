"""What a sample of committed rows is, for `make verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from cachemedic.studies.run import Run


@dataclass(frozen=True)
class Sample:
    """Rows of results/`csv`.csv that can be computed on their own.

    what: which rows, in words; keys: the columns that name a row; tolerance: for each compared column the largest
    difference, of values above 1 relative to them; compute: the rows anew, by the study that made them, from a run with
    the parameters of the sidecar.
    """

    csv: str
    what: str
    keys: tuple[str, ...]
    tolerance: Mapping[str, float]
    compute: Callable[[Run], pd.DataFrame]
