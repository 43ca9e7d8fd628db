"""What makes each defense, by name; any module, a notebook among them, can add one with `register_defense`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from transformers import PreTrainedModel

from cachemedic.core.registry import Registry
from cachemedic.defenses.clean_ranges import CacheStatistics
from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.models.shape import ModelShape


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a defense may be made from: the model, and clean caches of a calibration split."""

    model: PreTrainedModel
    clean: CachedTokens

    @cached_property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return ModelShape.of(self.model.config)

    @cached_property
    def statistics(self) -> CacheStatistics:
        """The ranges of the clean keys and values."""
        return CacheStatistics.of(self.clean)


Factory = Callable[[Calibration], Defense]
AnyFactory = TypeVar("AnyFactory", bound=Callable[..., Defense])

DEFENSES: Registry[Factory] = Registry("defense")  # what makes each defense, by name


def register_defense(name: str) -> Callable[[AnyFactory], AnyFactory]:
    """Makes a defense known by `name`: decorates a `Defense` class that needs no arguments, or a function that makes
    one from a `Calibration`.

        @register_defense("mine")
        class Mine(Defense):
            def read(self, damaged, kept): ...

        @register_defense("mine_calibrated")
        def mine_calibrated(calibration):
            return Clip(calibration.statistics)

    Raises `ValueError` for a name that another definition has.
    """

    def register(factory: AnyFactory) -> AnyFactory:
        DEFENSES.add(name, (lambda calibration: factory()) if isinstance(factory, type) else factory, factory)
        return factory

    return register
