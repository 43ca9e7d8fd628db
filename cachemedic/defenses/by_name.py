"""Any defense by name: those of this package, which are known once this module is imported, and all others."""

from __future__ import annotations

from cachemedic.defenses import heuristics, storage_defenses
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.registry import DEFENSES, Calibration

SHIPPED = (heuristics, storage_defenses)  # modules whose defenses register when they are imported


def create_defense(name: str, calibration: Calibration) -> Defense:
    """The defense of that name for a model. Raises `ValueError` for a name that is not registered."""
    return DEFENSES[name](calibration)
