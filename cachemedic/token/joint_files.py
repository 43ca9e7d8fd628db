"""The file of a joint model: one for all operators of a base, named by its content."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from cachemedic.models.load import EMBEDDED, WEIGHTS
from cachemedic.token.joint import JointModel


def joint_name(digest: str) -> str:
    """The name of the file of a joint model."""
    return f"joint-{digest[:16]}.safetensors"


def shipped_joint(base: str) -> JointModel | None:
    """The joint model of all layers that comes with an embedded base; None where none does."""
    found = list((WEIGHTS / base).glob("joint-*.safetensors")) if base in EMBEDDED else []
    return _read(found[0], found[0].stat().st_mtime_ns) if found else None


def file_of(joint: JointModel) -> dict[str, bytes | None]:
    """What an operator's folder has to hold of its joint model: nothing, if it comes with an embedded base."""
    name = joint_name(joint.digest)
    return {} if any((place / name).is_file() for place in WEIGHTS.glob("*/")) else {name: joint.as_bytes()}


def find_joint(folder: Path, digest: str) -> JointModel:
    """The joint model of this digest, from the folder of an operator, the one above it, or among the embedded bases.

    Operators of one base that are read one after another share it in memory. Raises `FileNotFoundError` if it is in
    none of them, `ValueError` if it is damaged.
    """
    name = joint_name(digest)
    for place in (folder, folder.parent, *sorted(WEIGHTS.glob("*/"))):
        if (place / name).is_file():
            joint = _read(place / name, (place / name).stat().st_mtime_ns)
            if joint.digest != digest:
                raise ValueError(f"{place / name} is another joint model than that of the operator")
            return joint
    raise FileNotFoundError(
        f"the joint model {name} of the operator in {folder} is neither there nor in the folder above"
    )


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> JointModel:
    return JointModel.from_file(path)
