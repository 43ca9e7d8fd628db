"""Uniform quantisation: numbers are read back as the nearest of equally spaced levels; caches in the layout of KIVI.

Rounding passes the gradient on (straight-through estimator), so that levels can be learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_BITS = 16  # of each stored zero and scale of a group


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
        code: Tensor = _Nearest.apply(self.place(x).clamp(least, largest))
        return code

    def read(self, codes: Tensor) -> Tensor:
        return codes * self.scale if self.zero is None else codes * self.scale + self.zero


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _rounded(x: Tensor, stored: torch.dtype | None) -> Tensor:
    return x if stored is None else x + (x.to(stored).to(x) - x).detach()  # the difference is exact, and so is the sum


Span = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # from numbers of groups and their mask: the outermost levels


def extremes(groups: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of the counted numbers of groups [..., g]: [..., 1] each."""
    low = groups.masked_fill(~counted, torch.inf).amin(-1, keepdim=True)
    return low, groups.masked_fill(~counted, -torch.inf).amax(-1, keepdim=True)


def quantise_in_groups(
    x: Tensor,
    counted: Tensor,
    bits: int,
    group: int,
    span: Span = extremes,
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


def quantise_cache(
    keys: Tensor, values: Tensor, valid: Tensor, bits: int, group: int, spans: tuple[Span, Span] = (extremes, extremes)
) -> tuple[Tensor, Tensor]:
    """Keys and values [..., L, G, T, d] as they are read back in KIVI's layout (Liu et al. 2024, arXiv 2402.02750).

    Keys share their levels by channel, over groups of tokens; values by token, over groups of channels of all heads of
    a layer. spans: of keys and of values, see `quantise_in_groups`; zero and scale of a group are kept in bf16. Keys
    that are padding (`valid` [..., T] is False) belong to no group and come back as they are.
    """
    at = valid[..., None, None, None, :]
    by_channel = quantise_in_groups(keys.float().mT, at, bits, group, spans[0], torch.bfloat16).mT
    tokens = values.float().movedim(-3, -2)  # [..., L, T, G, d]
    every = torch.ones_like(valid.flatten()[:1])
    by_token = quantise_in_groups(tokens.flatten(-2), every, bits, group, spans[1], torch.bfloat16)
    return by_channel.to(keys), by_token.unflatten(-1, tokens.shape[-2:]).movedim(-2, -3).to(values)


def cache_bits(heads: int, dim: int, bits: int, group: int) -> float:
    """What `quantise_cache` stores of a token in each layer, in bits: numbers, and two of 16 bits for each group.

    Groups of tokens count as full.
    """
    numbers, groups = heads * dim, -(heads * dim // -group)
    return 2 * numbers * bits + 2 * SCALE_BITS * (numbers / group + groups)
