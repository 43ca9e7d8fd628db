"""The files of a calibrated operator: its transform, or the name of one that ships, and its code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch

from cachemedic.models import EMBEDDED, WEIGHTS
from cachemedic.text import write_atomically
from cachemedic.token_aware.sketch_code import SketchCode
from cachemedic.token_aware.transform import Transform

TRANSFORM, STATISTICS, CODE = "transform.safetensors", "statistics.json", "code.safetensors"


def shipped_transform(base_name: str) -> Transform | None:
    """The transform of all layers of an embedded base; None for any other."""
    path = WEIGHTS / base_name / TRANSFORM
    return Transform.load(path) if base_name in EMBEDDED and path.exists() else None


def write_statistics(folder: Path, transform: Transform, code: SketchCode | None) -> None:
    """Writes the statistics into `folder`; a transform that ships with this package is only named."""
    digest, shipped = transform.digest, None
    for name in EMBEDDED:
        found = shipped_transform(name)
        if found is not None and found.digest == digest:
            shipped = name
    if shipped is None:
        transform.save(folder / TRANSFORM)
    if code is not None:
        write_atomically(folder / CODE, code.to_bytes())
    record = {"transform": digest, "of": shipped, "code": code and code.digest}
    write_atomically(folder / STATISTICS, (json.dumps(record, indent=2) + "\n").encode())


def read_statistics(folder: Path) -> tuple[Transform, SketchCode | None] | None:
    """What `write_statistics` wrote; None for an operator that was never calibrated.

    Raises `ValueError` if a file is damaged, missing, or of another transform.
    """
    if not (folder / STATISTICS).exists():
        return None
    try:
        record = json.loads((folder / STATISTICS).read_text())
        name = record["of"]
        transform = shipped_transform(name) if name else Transform.load(folder / TRANSFORM)
        stored = (folder / CODE).read_bytes() if record["code"] else None
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the statistics in {folder} are damaged: {error!r}") from error
    if transform is None or transform.digest != record["transform"]:
        raise ValueError(
            f"the transform of {name or folder} is not the one that the operator in {folder} was made with"
        )
    if stored is None:
        return transform, None
    if hashlib.sha256(stored).hexdigest() != record["code"]:
        raise ValueError(f"{folder / CODE} is damaged, or not the code that the operator was made with")
    return transform, SketchCode(transform, **safetensors.torch.load(stored))
