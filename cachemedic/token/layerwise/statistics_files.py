"""The files of a calibrated operator: its transform, or the name of one that ships, and its code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch

from cachemedic.models.load import EMBEDDED, WEIGHTS
from cachemedic.repair.operator import STATISTICS, UNNAMED
from cachemedic.token.layerwise.sketch_code import SketchCode
from cachemedic.token.layerwise.transform import Transform

TRANSFORM, CODE = "transform.safetensors", "code.safetensors"


def shipped_transform(base_name: str) -> Transform | None:
    """The transform of all layers of an embedded base; None for any other."""
    path = WEIGHTS / base_name / TRANSFORM
    return Transform.load(path) if base_name in EMBEDDED and path.exists() else None


def statistics_files(transform: Transform | None, code: SketchCode | None) -> dict[str, bytes | None]:
    """Content of the files by name, None for one that must not be there; a transform that ships is only named."""
    files: dict[str, bytes | None] = dict.fromkeys((TRANSFORM, CODE, STATISTICS))
    if transform is None:
        return files
    digest, shipped = transform.digest, None
    for name in EMBEDDED:
        found = shipped_transform(name)
        if found is not None and found.digest == digest:
            shipped = name
    if shipped is None:
        files[TRANSFORM] = transform.to_bytes()
    if code is not None:
        files[CODE] = code.to_bytes()
    record = {"transform": digest, "of": shipped, "code": code and code.digest}
    files[STATISTICS] = (json.dumps(record, indent=2) + "\n").encode()
    return files


def read_statistics(folder: Path, named: str | None) -> tuple[Transform, SketchCode | None] | None:
    """The inverse of `statistics_files`; None for an operator that was never calibrated.

    `named`: see `RepairOperator._read_beside`.
    Raises `ValueError` if a file is damaged, missing, or of another operator.
    """
    if named is None or (named == UNNAMED and not (folder / STATISTICS).exists()):
        return None
    try:
        content = (folder / STATISTICS).read_bytes()
        if named not in (UNNAMED, hashlib.sha256(content).hexdigest()):
            raise ValueError(f"the statistics in {folder} are damaged, or not those that the operator was saved with")
        record = json.loads(content)
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
