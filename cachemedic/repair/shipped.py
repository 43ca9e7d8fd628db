"""Operators that come with the package, by name: family/base, as in "E/embedded-gpt2".

Those of SmolLM2 are too large to come with it: each machine makes them once.
"""

from __future__ import annotations

from pathlib import Path

from cachemedic.core.cache_folder import cache_folder
from cachemedic.core.errors import nearest_valid
from cachemedic.models import smollm2

FOLDER = Path(__file__).parent / "weights"
CONFIG = "config.json"
MADE_HERE = tuple(f"{family}/{smollm2.NAME}" for family in ("D", "E"))


def shipped_operators() -> list[str]:
    """The names that `RepairOperator.from_pretrained` takes in place of a folder, but for those of `MADE_HERE`."""
    return sorted(path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.glob(f"*/*/{CONFIG}"))


def made_folder(name: str) -> Path:
    """Where this machine keeps an operator of `MADE_HERE`."""
    return cache_folder() / "operators" / name


def operator_folder(name_or_folder: str | Path) -> Path:
    """The folder of an operator: a folder that exists as it is, else that of the shipped operator of this name.

    Raises `FileNotFoundError` for what looks like a path and for an operator that is not made yet, `ValueError` for an
    unknown name.
    """
    folder, name = Path(name_or_folder), str(name_or_folder)
    if folder.exists():
        return folder
    if name in shipped_operators():
        return FOLDER / name
    if name in MADE_HERE:
        if (made_folder(name) / CONFIG).is_file():
            return made_folder(name)
        raise FileNotFoundError(
            f"{name} is made once on each machine, in about ten minutes: python -m cachemedic.studies.ship_operators "
            f"{smollm2.NAME}"
        )
    if isinstance(name_or_folder, str) and name.count("/") == 1 and not name.startswith((".", "/")):
        raise nearest_valid("operator", name, [*shipped_operators(), *MADE_HERE])
    raise FileNotFoundError(f"there is no folder {folder}, and no operator of this name ships")
