"""Operators that come with the package, trained, by name: family/base, as in "E/embedded-gpt2"."""

from __future__ import annotations

from pathlib import Path

from cachemedic.core.errors import nearest_valid

FOLDER = Path(__file__).parent / "weights"
CONFIG = "config.json"


def shipped_operators() -> list[str]:
    """The names that `RepairOperator.from_pretrained` takes in place of a folder."""
    return sorted(path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.glob(f"*/*/{CONFIG}"))


def operator_folder(name_or_folder: str | Path) -> Path:
    """The folder of an operator: a folder that exists as it is, else that of the shipped operator of this name.

    Raises `FileNotFoundError` for what looks like a path, `ValueError` for an unknown name.
    """
    folder, name = Path(name_or_folder), str(name_or_folder)
    if folder.exists():
        return folder
    if name in shipped_operators():
        return FOLDER / name
    if isinstance(name_or_folder, str) and name.count("/") == 1 and not name.startswith((".", "/")):
        raise nearest_valid("operator", name, shipped_operators())
    raise FileNotFoundError(f"there is no folder {folder}, and no operator of this name ships")
