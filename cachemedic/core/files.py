"""Files that are written whole or not at all, carry the hash of what they hold, and are checked when they are read.

Three kinds carry their hash: JSON records and lines of logs (`seal`, under the key `checksum`), tensors
(`tensor_bytes` of `cachemedic.core.tensors`), and anything else (`write_hashed`, in a first line). A damaged file is a
`ValueError` that names it. What a process that was killed has left behind is removed when something is next written
beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUM = "checksum"
FIRST_LINE = b"sha256 "
LONGEST_WRITE = 24 * 3600  # seconds; what is older is nobody's, whichever machine wrote it


def digest(data: bytes) -> str:
    """The sha256 of `data`, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all (temporary file in the same folder, then rename).

    Raises `OSError`, which names the file, if it cannot be written.
    """
    replace_together(path.parent, {path.name: data})


def replace_together(folder: Path, files: Mapping[str, bytes | None], last: str | None = None) -> None:
    """Replaces files of a folder (None: removes one) in this order once all are written.

    The file `last` is gone while the others are replaced: without it none counts. Raises `OSError`, which names the
    file that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    staged = Path(tempfile.mkdtemp(dir=folder, prefix=_own_prefix(), suffix=".tmp"))
    try:
        for name, content in files.items():
            if content is not None:
                with naming(folder / name):
                    (staged / name).write_bytes(content)
        if last is not None:
            (folder / last).unlink(missing_ok=True)  # until the new one is there, the others are not of one piece
        for name, content in files.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                os.replace(staged / name, folder / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed while it wrote has left in `folder`."""
    for left in folder.glob(".writing-*.tmp"):
        _, machine, process, _ = left.name.rsplit("-", 3)
        try:
            old = time.time() - left.stat().st_mtime > LONGEST_WRITE
        except FileNotFoundError:  # written to its end meanwhile
            continue
        if old or (machine == _machine() and not _runs(int(process))):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within, an `OSError` that does not say so names `path` (a full disk, for example)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and Path(error.filename) == path:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def seal(record: Mapping[str, Any], indent: int | None = 2) -> bytes:
    """A JSON object with the hash of its content under the key `checksum`; without `indent` it is one line."""
    content = {name: value for name, value in record.items() if name != CHECKSUM}
    return (json.dumps(content | {CHECKSUM: _checksum(content)}, indent=indent) + "\n").encode()


def unseal(data: bytes, place: object) -> dict[str, Any]:
    """What `seal` has made, without its hash. Raises `ValueError`, which names the `place`, if it is damaged."""
    try:
        record = json.loads(data)
        found = record.pop(CHECKSUM)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{place} is damaged: {error!r}") from error
    if found != _checksum(record):
        raise ValueError(f"{place} is damaged: it is not as it was saved")
    return record


def read_sealed(path: Path) -> dict[str, Any]:
    """What `seal` has made of a file. Raises `FileNotFoundError`, and `ValueError` if it is damaged."""
    return unseal(path.read_bytes(), path)


def write_hashed(path: Path, data: bytes) -> None:
    """Write `data` to `path`, after a first line with its hash."""
    write_atomically(path, FIRST_LINE + digest(data).encode() + b"\n" + data)


def read_hashed(path: Path) -> bytes:
    """The data that `write_hashed` wrote. Raises `FileNotFoundError`, and `ValueError` if it is damaged."""
    line, end, data = path.read_bytes().partition(b"\n")
    if line + end != FIRST_LINE + digest(data).encode() + b"\n":
        raise ValueError(f"{path} is damaged, it does not hold what was written: delete it to have it made anew")
    return data


def _checksum(record: Mapping[str, Any]) -> str:
    return digest(json.dumps(record, sort_keys=True).encode())


def _own_prefix() -> str:
    return f".writing-{_machine()}-{os.getpid()}-"


def _machine() -> str:
    return digest(platform.node().encode())[:12]


def _runs(process: int) -> bool:
    """Whether a process of this number runs; where that cannot be told, yes."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
