"""CacheMedic++: learned repair of corrupted key/value caches of language models.

    from cachemedic import CorruptionSpec, RepairOperator, SketchCache, calibrate, corrupt_cache, load_base, protect

A name is imported from its module when it is first used, so that `import cachemedic` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachemedic.corruption.apply import corrupt_cache
    from cachemedic.corruption.spec import CorruptionSpec
    from cachemedic.models.load import load_base
    from cachemedic.repair.attach import protect
    from cachemedic.repair.operator import RepairOperator
    from cachemedic.token.cache import SketchCache
    from cachemedic.token.joint_calibrate import calibrate
    from cachemedic.token.look_after import look_after
    from cachemedic.token.plausible import check_cache
    from cachemedic.token.recompute import recompute

__version__ = "0.1.0"
__all__ = [
    "CorruptionSpec",
    "RepairOperator",
    "SketchCache",
    "calibrate",
    "check_cache",
    "corrupt_cache",
    "load_base",
    "look_after",
    "protect",
    "recompute",
]

_HOMES = {
    "CorruptionSpec": "corruption.spec",
    "RepairOperator": "repair.operator",
    "SketchCache": "token.cache",
    "calibrate": "token.joint_calibrate",
    "check_cache": "token.plausible",
    "corrupt_cache": "corruption.apply",
    "load_base": "models.load",
    "look_after": "token.look_after",
    "protect": "repair.attach",
    "recompute": "token.recompute",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
