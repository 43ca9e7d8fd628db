"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all (temporary file in the same folder, then rename)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def replace_together(folder: Path, files: Mapping[str, bytes | None], last: str) -> None:
    """Replaces files of a folder (None: removes one) in this order once all are written; without `last` none counts."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as staged:
        for name, content in files.items():
            if content is not None:
                (Path(staged) / name).write_bytes(content)
        (folder / last).unlink(missing_ok=True)  # until the new one is there, the others are not of one piece
        for name, content in files.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                os.replace(Path(staged) / name, folder / name)
