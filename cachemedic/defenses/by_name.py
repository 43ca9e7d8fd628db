"""Any defense by name. A package offers modules with defenses as entry points of the group `cachemedic.defenses`."""

from __future__ import annotations

from importlib.metadata import entry_points

from cachemedic.defenses.defense import Defense
from cachemedic.defenses.registry import DEFENSES, Calibration

GROUP = "cachemedic.defenses"


def create_defense(name: str, calibration: Calibration) -> Defense:
    """The defense of that name for a model. Raises `ValueError` for a name that is not registered."""
    for module in entry_points(group=GROUP):
        module.load()  # its decorators register what it has
    return DEFENSES[name](calibration)
