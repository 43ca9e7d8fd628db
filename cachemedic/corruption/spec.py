"""What to corrupt: the specification a person writes, and the event drawn from it for one sample."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from numbers import Integral, Real
from types import NoneType
from typing import Any

import torch

from cachemedic.core.errors import check_given, shown
from cachemedic.core.integers import whole_numbers
from cachemedic.core.severity_map import SeverityMap, Shape
from cachemedic.corruption.severity import shipped_map
from cachemedic.corruption.storage_faults import page_mask, page_offset
from cachemedic.corruption.types import CORRUPTIONS, NONE, check_type

CALIBRATED_POSITIONS = 128  # the prefix length at which severities were calibrated; overwrite lengths scale from it

Axis = str | float | tuple[int, ...]  # "all", a Bernoulli probability, or indices


@dataclass(frozen=True)
class CorruptionSpec:
    """A corruption by type, strength and masks; an event is drawn from it for every sample.

    `severity` is damage as a share of the value of the context, turned into a parameter by the calibrated map of `base`
    (None: the one base that the cache's shape tells) in `severity_map` (None: the one that ships); `parameter` sets the
    type's own parameter directly. Type "none" takes neither, every other type exactly one; a type without parameters of
    calibration has no severity but 0.
    `layers` and `heads` (key/value heads): "all", a float p (each is hit with probability p) or a list of indices.
    `time`: "all_past", ("old_only", n) spares the n newest positions, ("window", a, b) hits a <= t < b only.
    `share` of the positions that `time` allows is hit, each independently; of types that hit pages, a share of pages.
    Raises `ValueError` for any value out of its range.
    """

    type: str
    severity: float | None = None
    parameter: float | None = None
    share: float = 1.0
    layers: Axis = "all"
    heads: Axis = "all"
    time: str | tuple[str, int] | tuple[str, int, int] = "all_past"
    base: str | None = None
    severity_map: SeverityMap | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_type(self.type)
        check_given("severity_map", self.severity_map, (SeverityMap, NoneType))
        for name in ("severity", "parameter", "share"):
            number = getattr(self, name)
            if not isinstance(number, Real) and (number is not None or name == "share"):
                raise TypeError(f"{name} must be a number, not {shown(number)}")
        given = [name for name in ("severity", "parameter") if getattr(self, name) is not None]
        if self.type == NONE:
            if given:
                raise ValueError(f"corruption type 'none' takes no {given[0]}, got {shown(getattr(self, given[0]))}")
        elif len(given) != 1:
            raise ValueError(
                f"corruption type {shown(self.type)} needs exactly one of severity and parameter, "
                f"got severity={shown(self.severity)} and parameter={shown(self.parameter)}"
            )
        if self.severity is not None and not (self.severity >= 0 and math.isfinite(self.severity)):
            raise ValueError(f"severity {shown(self.severity)} is out of range: a number from 0 upwards")
        if self.severity and not (known := CORRUPTIONS[self.type]).calibration:
            raise ValueError(
                f"the severity of {self.type} is not calibrated, got severity={shown(self.severity)}; give "
                f"parameter=..., {known.parameter} from {known.low:g} to {known.high:g}"
            )
        if self.parameter is not None:
            CORRUPTIONS[self.type].check(self.type, self.parameter)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share {shown(self.share)} is out of range: a number from 0 to 1")
        for name in ("layers", "heads"):
            object.__setattr__(self, name, _checked_axis(name, getattr(self, name)))
        object.__setattr__(self, "time", _checked_time(self.time))

    @property
    def needs_donor(self) -> bool:
        """Whether another prompt's cache is needed to draw it."""
        return self.type != NONE and CORRUPTIONS[self.type].needs_donor


@dataclass(frozen=True, eq=False)
class CorruptionEvent:
    """One corruption of one sample: type, strength, and the three masks."""

    type: str
    severity: float  # nan where the strength was given as a parameter
    parameter: float
    share: float
    layers: torch.Tensor  # [L] bool
    heads: torch.Tensor  # [L, G] bool
    time: torch.Tensor  # [T] bool
    offset: int  # positions between a page and the donor's page that a stale one holds

    @property
    def is_active(self) -> bool:
        """Whether any entry is hit at all."""
        return self.type != NONE and self.parameter != 0 and self.n_heads > 0 and self.n_positions > 0

    @property
    def n_layers(self) -> int:
        """Layers with at least one head hit."""
        return int((self.layers & self.heads.any(1)).sum())

    @property
    def n_heads(self) -> int:
        """Heads hit, over all layers."""
        return int((self.layers[:, None] & self.heads).sum())

    @property
    def n_positions(self) -> int:
        """Positions hit."""
        return int(self.time.sum())

    def at_layer(self, layer: int) -> CorruptionEvent:
        """The same event on one layer alone."""
        return replace(self, layers=self.layers[layer : layer + 1], heads=self.heads[layer : layer + 1])

    def as_record(self) -> dict[str, Any]:
        """For a JSON log; `severity` is None where the strength was given as a parameter."""
        return {
            "type": self.type,
            "severity": None if math.isnan(self.severity) else self.severity,
            "parameter": self.parameter,
            "share": self.share,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_positions": self.n_positions,
        }


def draw_event(spec: CorruptionSpec, shape: Shape, generator: torch.Generator) -> CorruptionEvent:
    """One sample's event for a cache of `shape` (L, G, T).

    The number of random draws depends on `shape` alone, so that events of different specifications under one seed share
    theirs (common random numbers). Raises `ValueError` where a mask does not fit the cache.
    """
    n_layers, n_heads, n_positions = shape
    u = torch.rand(n_layers + n_layers * n_heads + n_positions + 1, generator=generator, device=generator.device)
    u_layers, u_heads, u_time, u_start = u.cpu().split([n_layers, n_layers * n_heads, n_positions, 1])
    layers = _axis_mask("layer", spec.layers, u_layers)
    heads = _axis_mask("head", spec.heads, u_heads.view(n_layers, n_heads))
    start, stop = _allowed_positions(spec.time, n_positions)
    severity, parameter, share = _strength(spec, shape)
    corruption = None if spec.type == NONE else CORRUPTIONS[spec.type]
    if corruption is not None and corruption.is_length:
        parameter = min(parameter, stop - start)
        start += int(u_start.item() * (stop - start - parameter + 1))
        stop = start + int(parameter)
    if corruption is not None and corruption.paged:
        time = page_mask(parameter * share, start, stop, u_time)
    else:
        positions = torch.arange(n_positions)
        time = (positions >= start) & (positions < stop) & (u_time < share)
    offset = page_offset(u_start.item(), n_positions)
    return CorruptionEvent(spec.type, float(severity), float(parameter), share, layers, heads, time, offset)


def _strength(spec: CorruptionSpec, shape: Shape) -> tuple[float, float, float]:
    """Severity, parameter and share of positions; severity 0 hits no position, whatever the type."""
    if spec.type == NONE or spec.severity == 0:
        return 0.0, 0.0, 0.0
    corruption = CORRUPTIONS[spec.type]
    if spec.severity is None:
        assert spec.parameter is not None  # checked by the specification
        if corruption.is_length and spec.parameter > shape[2]:
            raise ValueError(
                f"{spec.type} length {shown(spec.parameter)} is out of range: the cache holds {shape[2]} positions"
            )
        return math.nan, spec.parameter, spec.share
    calibrated = spec.severity_map or shipped_map()
    parameter, share = calibrated.resolve(spec.type, spec.severity, spec.base, shape, corruption.by_share)
    if corruption.is_length:
        parameter = max(1, round(parameter * shape[2] / CALIBRATED_POSITIONS))
    return spec.severity, parameter, share * spec.share


def _checked_axis(name: str, value: Any) -> Axis:
    if getattr(value, "ndim", None) == 0:  # one number of NumPy or torch
        value = value.item()
    if isinstance(value, str) and value == "all":
        return value
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 <= float(value) <= 1:
        return float(value)
    with suppress(TypeError, ValueError):
        if indices := whole_numbers(name, value, 0):
            return indices
    raise ValueError(
        f"{name}={shown(value)} is not a mask; allowed: 'all', a float from 0 to 1 (the chance of each to be hit), "
        "or a non-empty list of indices from 0"
    )


def _checked_time(value: Any) -> Any:
    if isinstance(value, str) and value == "all_past":
        return value
    with suppress(TypeError, ValueError):
        mode, *given = islice(value, 4)
        numbers = whole_numbers("time", given, 0)
        if (mode == "old_only" and len(numbers) == 1) or (
            mode == "window" and len(numbers) == 2 and numbers[0] < numbers[1]
        ):
            return (mode, *numbers)
    raise ValueError(
        f"time={shown(value)} is not a position mask; allowed: 'all_past', ('old_only', n_recent) or "
        "('window', a, b) with 0 <= a < b"
    )


def _axis_mask(name: str, axis: Axis, u: torch.Tensor) -> torch.Tensor:
    """A boolean mask in the shape of the uniform draws `u`, over its last dimension."""
    if axis == "all":
        return torch.ones_like(u, dtype=torch.bool)
    if isinstance(axis, float):
        return u < axis
    assert isinstance(axis, tuple)  # checked by the specification
    if max(axis) >= u.shape[-1]:
        raise ValueError(f"{name} {max(axis)} is out of range: the cache has {u.shape[-1]} (0 to {u.shape[-1] - 1})")
    mask = torch.zeros_like(u, dtype=torch.bool)
    mask[..., list(axis)] = True
    return mask


def _allowed_positions(time: Any, n_positions: int) -> tuple[int, int]:
    """The range [start, stop) of positions that a `time` mask allows in a cache of `n_positions`."""
    if time == "all_past":
        return 0, n_positions
    mode, *numbers = time
    start, stop = (0, n_positions - numbers[0]) if mode == "old_only" else numbers
    if not start < stop <= n_positions:
        raise ValueError(f"time={shown(time)} does not fit a cache of {n_positions} positions")
    return start, stop
