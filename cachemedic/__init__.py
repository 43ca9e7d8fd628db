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
    from cachemedic.token.calibration import calibrate
    from cachemedic.token.sketch_cache import SketchCache

__version__ = "0.1.0"
__all__ = ["CorruptionSpec", "RepairOperator", "SketchCache", "calibrate", "corrupt_cache", "load_base", "protect"]

_HOMES = {
    "CorruptionSpec": "corruption.spec",
    "RepairOperator": "repair.operator",
    "SketchCache": "token.sketch_cache",
    "calibrate": "token.calibration",
    "corrupt_cache": "corruption.apply",
    "load_base": "models.load",
    "protect": "repair.attach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
