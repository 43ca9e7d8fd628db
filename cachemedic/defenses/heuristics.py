"""Baselines: what can be done about a corrupted cache without a trained operator.

A blind defence sees the corrupted cache only. An oracle is told which entries are damaged; a reference also holds the
clean cache. All map keys and values [B, L, G, T, d] to what attention shall read, and leave their inputs as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch

from cachemedic.defenses.clean_ranges import CacheStatistics, Range, by_slot, is_first


@dataclass(frozen=True, eq=False)
class Defended:
    """What attention reads: k, v [B, L, G, T, d], and keep [B, T], the positions it may read (None: all)."""

    k: torch.Tensor
    v: torch.Tensor
    keep: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Truth:
    """What only an experimenter knows: the clean cache, and the entries that differ from it, damaged [B, L, G, T]."""

    k: torch.Tensor
    v: torch.Tensor
    damaged: torch.Tensor


class Defence(Protocol):
    """A blind defence. `valid` [B, T] tells the cached positions from the padding on their left."""

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Defended: ...


class Oracle(ABC):
    """A defence that is told the truth."""

    @abstractmethod
    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor, truth: Truth) -> Defended: ...


# --- blind defences ---------------------------------------------------------------------------------------------------


class NoDefence:
    """Reads the cache as it is."""

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Defended:
        return Defended(k, v)


class Reset:
    """Erases the whole cache: attention reads the decoded tokens only."""

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Defended:
        return Defended(k, v, torch.zeros_like(valid))


@dataclass(frozen=True)
class Smoothing:
    """Exponential smoothing over positions: y_0 = x_0, y_t = beta y_{t-1} + (1 - beta) x_t."""

    beta: float = 0.3

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Defended:
        weight = torch.where(is_first(valid), 1.0, 1.0 - self.beta) * valid
        return Defended(*(self._smooth(x, weight.to(x.dtype)[:, None, None, :, None]) for x in (k, v)))

    def _smooth(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # sum_j beta^j x_{t-j} by doubling: after each step a position holds the sum over twice as many predecessors
        y, step = x * weight, 1
        while step < x.shape[3] and self.beta**step > torch.finfo(x.dtype).tiny:
            shifted = y[..., :-step, :] * self.beta**step
            y[..., step:, :] += shifted
            step *= 2
        return y


@dataclass(frozen=True)
class Dropout:
    """Attention may not read a random share of the positions, drawn anew from `seed` for every batch."""

    share: float = 0.1
    seed: int = 0

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Defended:
        generator = torch.Generator().manual_seed(self.seed)
        return Defended(k, v, (torch.rand(valid.shape, generator=generator) >= self.share).to(valid.device))


@dataclass(frozen=True, eq=False)
class Masking:
    """Attention may not read positions that look damaged: a share over `tolerance` of their entries is out of range."""

    statistics: CacheStatistics
    tolerance: float = 0.01

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Defended:
        outside = [
            by_slot(x, valid, ranges, lambda x, clean: ((x < clean.low) | (x > clean.high)).to(x.dtype))
            for x, ranges in ((k, self.statistics.k), (v, self.statistics.v))
        ]
        share = torch.stack([x.mean((1, 2, 4)) for x in outside]).mean(0)
        return Defended(k, v, share <= self.tolerance)


@dataclass(frozen=True, eq=False)
class ClipRenormalise:
    """Clips channels to `width` standard deviations, then restores the vector's norm, up to the largest clean one."""

    statistics: CacheStatistics
    width: float = 3.0

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Defended:
        return Defended(
            by_slot(k, valid, self.statistics.k, self._clip),
            by_slot(v, valid, self.statistics.v, self._clip),
        )

    def _clip(self, x: torch.Tensor, clean: Range) -> torch.Tensor:
        margin = self.width * clean.std
        clipped = x.clamp(clean.mean - margin, clean.mean + margin)
        norm = torch.minimum(x.norm(dim=-1, keepdim=True), clean.norm)
        return clipped * (norm / clipped.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))


@dataclass(frozen=True, eq=False)
class RangeRestriction:
    """Clips every channel to the range that it had in clean caches (Ranger, Chen et al. 2020, for caches)."""

    statistics: CacheStatistics

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Defended:
        return Defended(
            by_slot(k, valid, self.statistics.k, lambda x, clean: x.clamp(clean.low, clean.high)),
            by_slot(v, valid, self.statistics.v, lambda x, clean: x.clamp(clean.low, clean.high)),
        )


def blind_defences(statistics: CacheStatistics) -> dict[str, Defence]:
    """Every blind defence by name, `none` first."""
    return {
        "none": NoDefence(),
        "reset": Reset(),
        "smoothing": Smoothing(),
        "dropout": Dropout(),
        "masking": Masking(statistics),
        "clip_renormalise": ClipRenormalise(statistics),
        "range_restriction": RangeRestriction(statistics),
    }


# --- oracles and references -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnDamaged(Oracle):
    """A blind defence that is told which entries are damaged and leaves all others alone."""

    defence: Defence

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor, truth: Truth) -> Defended:
        told, hit = self.defence(k, v, valid), truth.damaged[..., None]
        keep = None if told.keep is None else told.keep | ~truth.damaged.any(2).any(1)
        return Defended(torch.where(hit, told.k, k), torch.where(hit, told.v, v), keep)


class Recompute(Oracle):
    """Prefills again: the clean cache, at the price of a prefill."""

    def __call__(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor, truth: Truth) -> Defended:
        return Defended(truth.k, truth.v)


def oracles(statistics: CacheStatistics) -> dict[str, Oracle]:
    """The heuristics told the true mask, and the references.

    `erase_damaged` erases exactly the positions at which any entry is damaged; `reset` above erases everything.
    """
    return {
        "recompute": Recompute(),
        "erase_damaged": OnDamaged(Reset()),
        "smoothing_oracle": OnDamaged(Smoothing()),
        "clip_renormalise_oracle": OnDamaged(ClipRenormalise(statistics)),
        "range_restriction_oracle": OnDamaged(RangeRestriction(statistics)),
    }
