"""Reading a table of results, which the sidecar beside it knows by its hash; the sidecar carries its own."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd

from cachemedic.core.files import digest, read_sealed


def read_result(path: Path) -> pd.DataFrame:
    """The table of results/NAME.csv.

    Raises `ValueError` unless it is there and as results/NAME.json describes it, and that is as it was written.
    """
    sidecar = path.with_suffix(".json")
    for needed in (path, sidecar):
        if not needed.is_file():
            raise ValueError(f"{needed} does not exist; `make results/{path.name}` makes it")
    data = path.read_bytes()
    if digest(data) != read_sealed(sidecar)["sha256"]:
        raise ValueError(f"{path} is not as {sidecar.name} describes it; `make results/{path.name}` makes it anew")
    return pd.read_csv(io.BytesIO(data))
