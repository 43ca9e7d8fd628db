"""Operators by name: those that come with the package, as "E/embedded-gpt2", and those of a hub, as "org/name".

Those of SmolLM2 are too large to come with it: each machine makes them once.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from cachemedic.core.cache_folder import cache_folder
from cachemedic.core.errors import nearest, nearest_valid
from cachemedic.core.files import read_sealed
from cachemedic.core.hub import why_out_of_reach
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
    """The folder of an operator: a folder that exists as it is, that of an operator by name, or a copy from the hub.

    Raises `FileNotFoundError` for what looks like a path and for an operator that is not made yet, `ValueError` for an
    unknown name, and as `hub_folder`.
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
    if not isinstance(name_or_folder, str) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {folder}, and no operator of this name ships")
    names = [*shipped_operators(), *MADE_HERE]
    if name[:2] in {known[:2] for known in names} or nearest(name, names, likeness=0.8):
        raise nearest_valid("operator", name, names)
    return hub_folder(name)


def hub_folder(name: str) -> Path:
    """A copy of the operator that a repository "org/name" of the Hugging Face hub holds: JSON and safetensors, no more.

    Raises `ValueError` if it cannot be fetched or holds no operator, at once if the hub cannot be reached.
    """
    if reason := why_out_of_reach(name):
        raise ValueError(f"unknown operator {name!r}: no folder, none that ships, and {reason}")
    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG]))
        if not (folder / CONFIG).is_file() or "family" not in read_sealed(folder / CONFIG):
            raise ValueError(f"its {CONFIG} is not that of an operator")
        return Path(snapshot_download(name, revision=folder.name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError, HFValidationError) as error:
        raise ValueError(f"{name!r} on the Hugging Face hub holds no operator that can be read: {error}") from error
