"""CacheMedic++: learned repair of corrupted key/value caches of language models.

    from cachemedic import CorruptionSpec, RepairOperator, SketchCache, calibrate, corrupt_cache, load_base, protect

A name is imported from its module when it is first used, so that `import cachemedic` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachemedic.attention import protect
    from cachemedic.corruption import corrupt_cache
    from cachemedic.corruption_spec import CorruptionSpec
    from cachemedic.models import load_base
    from cachemedic.operators import RepairOperator
    from cachemedic.token_aware.calibration import calibrate
    from cachemedic.token_aware.sketch_cache import SketchCache

__version__ = "0.1.0"
__all__ = ["CorruptionSpec", "RepairOperator", "SketchCache", "calibrate", "corrupt_cache", "load_base", "protect"]

_HOMES = {
    "CorruptionSpec": "corruption_spec",
    "RepairOperator": "operators",
    "SketchCache": "token_aware.sketch_cache",
    "calibrate": "token_aware.calibration",
    "corrupt_cache": "corruption",
    "load_base": "models",
    "protect": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
