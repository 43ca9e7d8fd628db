"""What clean keys and values look like, measured on a calibration split, for defenses that are calibrated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cachemedic.defenses.defense import CachedTokens

PLAUSIBLE = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class Range:
    """Clean keys or values: low, high, mean, std [L, G, 1, d] of each channel; norm [L, G, 1, 1], the largest."""

    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Range:
        """The range of vectors x [S, L, G, d]."""
        std, mean = torch.std_mean(x.float(), 0, correction=0)
        norm = x.norm(dim=-1, keepdim=True).amax(0)
        low, high, mean, std = x.amin(0), x.amax(0), mean.to(x.dtype), std.to(x.dtype)
        return cls(low[:, :, None], high[:, :, None], mean[:, :, None], std[:, :, None], norm[:, :, None])


@dataclass(frozen=True, eq=False)
class CacheStatistics:
    """Clean ranges: (first, others) for keys and for values.

    The first position has ranges of its own: attention uses it as a sink, and it lies far from all the others.
    """

    k: tuple[Range, Range]
    v: tuple[Range, Range]

    @classmethod
    def of(cls, clean: CachedTokens) -> CacheStatistics:
        """Those of the clean caches of a calibration split. Raises `ValueError` below two positions."""
        valid = clean.valid
        if valid.shape[1] < 2:
            raise ValueError(f"statistics need prefixes of at least 2 positions, got {valid.shape[1]}")
        first = is_first(valid)
        others = valid & ~first
        k, v = clean.k.movedim(3, 1), clean.v.movedim(3, 1)  # [N, T, L, G, d]
        return cls((Range.of(k[first]), Range.of(k[others])), (Range.of(v[first]), Range.of(v[others])))


def is_first(valid: torch.Tensor) -> torch.Tensor:
    """The first real position of every row, [B, T]."""
    return valid & (valid.cumsum(1) == 1)


def by_slot(
    x: torch.Tensor,
    valid: torch.Tensor,
    ranges: tuple[Range, Range],
    rule: Callable[[torch.Tensor, Range], torch.Tensor],
) -> torch.Tensor:
    """`rule` applied to x [B, L, G, T, d] with the range of each position (padding counts as other positions)."""
    result = rule(x, ranges[1])
    rows, first = torch.arange(len(x), device=x.device), valid.int().argmax(1)
    result[rows, :, :, first] = rule(x[rows, :, :, first][..., None, :], ranges[0])[..., 0, :]
    return result


def plausible(x: torch.Tensor) -> torch.Tensor:
    """x with zero for NaN and for what is beyond the range of fp16, which no clean key or value comes near.

    One flipped exponent bit makes such values, and a single one poisons every later token, masked or not.
    """
    return torch.where(x.abs() <= PLAUSIBLE, x, 0.0)
