"""Reading a table of results, which the sidecar beside it knows by its hash."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd

from cachemedic.core.files import digest


def read_result(path: Path) -> pd.DataFrame:
    """The table of results/NAME.csv. Raises `ValueError` unless it is there and as results/NAME.json describes it."""
    sidecar = path.with_suffix(".json")
    for needed in (path, sidecar):
        if not needed.is_file():
            raise ValueError(f"{needed} does not exist; `make results/{path.name}` makes it")
    data = path.read_bytes()
    try:
        expected = json.loads(sidecar.read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sidecar} is damaged: {error!r}") from error
    if digest(data) != expected:
        raise ValueError(f"{path} is not as {sidecar.name} describes it; `make results/{path.name}` makes it anew")
    return pd.read_csv(io.BytesIO(data))
