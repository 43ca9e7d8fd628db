"""Uniform quantisation: numbers are read back as the nearest of equally spaced levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class UniformLevels:
    """Code c stands for zero + c * scale; scale > 0 and zero broadcast to the numbers, and zero may be None for 0."""

    scale: Tensor
    zero: Tensor | None = None

    @staticmethod
    def symmetric(magnitude: Tensor, largest: int, stored: torch.dtype | None = None) -> UniformLevels:
        """Levels about zero whose code `largest` reaches `magnitude`; the scale is rounded to the format `stored`."""
        return UniformLevels(_rounded(magnitude / largest, stored).clamp_min(torch.finfo(magnitude.dtype).tiny))

    @staticmethod
    def spanning(low: Tensor, high: Tensor, largest: int, stored: torch.dtype | None = None) -> UniformLevels:
        """Levels whose codes 0 to `largest` go from `low` to `high`; zero and scale are rounded to `stored`."""
        zero = _rounded(low, stored)
        scale = _rounded((high - zero) / largest, stored)
        return UniformLevels(scale.clamp_min(torch.finfo(low.dtype).tiny), zero)  # a constant group stays as it is

    def place(self, x: Tensor) -> Tensor:
        """Where numbers lie among the levels: their codes before rounding."""
        return (x if self.zero is None else x - self.zero) / self.scale

    def codes(self, x: Tensor, least: int, largest: int) -> Tensor:
        """The nearest code from `least` to `largest`, whole numbers in the format of `x`."""
        return self.place(x).round().clamp(least, largest)

    def read(self, codes: Tensor) -> Tensor:
        return codes * self.scale if self.zero is None else codes * self.scale + self.zero


def _rounded(x: Tensor, stored: torch.dtype | None) -> Tensor:
    return x if stored is None else x.to(stored).to(x)


def extremes(groups: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of the counted numbers of groups [..., g]: [..., 1] each."""
    low = groups.masked_fill(~counted, torch.inf).amin(-1, keepdim=True)
    return low, groups.masked_fill(~counted, -torch.inf).amax(-1, keepdim=True)


def quantise_in_groups(
    x: Tensor,
    counted: Tensor,
    bits: int,
    group: int,
    span: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = extremes,
    stored: torch.dtype | None = None,
) -> Tensor:
    """x [..., n] as it is read back from `bits` a number, in groups along the last dimension; the last may be short.

    The 2**bits levels of a group span what `span` finds in its numbers, [..., group] with their mask; zero and scale
    are kept in the format `stored`, or unrounded. Entries that are not `counted` (bool, broadcast to x) belong to no
    group and come back as they are.
    """
    n, largest = x.shape[-1], 2**bits - 1
    pad = -n % group
    counted = F.pad(counted.expand(x.shape), (0, pad)).unflatten(-1, (-1, group))
    groups = F.pad(x, (0, pad)).unflatten(-1, (-1, group))
    levels = UniformLevels.spanning(*span(groups, counted), largest, stored)
    read = levels.read(levels.codes(groups, 0, largest))
    return torch.where(counted, read, groups).flatten(-2)[..., :n]
