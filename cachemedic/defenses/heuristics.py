"""Baselines: what can be done about a damaged cache without a trained operator and without protected storage.

A blind defense sees the damaged cache only. An oracle keeps the clean cache, at no counted cost, and so knows which
entries are damaged; a reference reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cachemedic.defenses.clean_ranges import CacheStatistics, Range, by_slot, is_first
from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.defenses.registry import DEFENSES, Calibration, register_defense

# --- blind defenses ---------------------------------------------------------------------------------------------------


@register_defense("none")
class NoDefense(Defense):
    """Reads the cache as it is."""


@register_defense("reset")
class Reset(Defense):
    """Erases the whole cache: attention reads the decoded tokens only."""

    def read(self, damaged: CachedTokens, kept: None) -> CachedTokens:
        return replace(damaged, readable=torch.zeros_like(damaged.valid))


@register_defense("smoothing")
@dataclass(frozen=True)
class Smoothing(Defense):
    """Exponential smoothing over positions: y_0 = x_0, y_t = beta y_{t-1} + (1 - beta) x_t."""

    beta: float = 0.3

    def read(self, damaged: CachedTokens, kept: None) -> CachedTokens:
        valid = damaged.valid
        weight = (torch.where(is_first(valid), 1.0, 1.0 - self.beta) * valid)[:, None, None, :, None]
        k, v = (self._smooth(x, weight.to(x.dtype)) for x in (damaged.k, damaged.v))
        return replace(damaged, k=k, v=v)

    def _smooth(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # sum_j beta^j x_{t-j} by doubling: after each step a position holds the sum over twice as many predecessors
        y, step = x * weight, 1
        while step < x.shape[3] and self.beta**step > torch.finfo(x.dtype).tiny:
            shifted = y[..., :-step, :] * self.beta**step
            y[..., step:, :] += shifted
            step *= 2
        return y


@register_defense("dropout")
@dataclass(frozen=True)
class Dropout(Defense):
    """Attention may not read a random share of the positions, drawn anew from `seed` for every batch."""

    share: float = 0.1
    seed: int = 0

    def read(self, damaged: CachedTokens, kept: None) -> CachedTokens:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(damaged.ids.shape, generator=generator)
        return replace(damaged, readable=(drawn >= self.share).to(damaged.k.device))


@dataclass(frozen=True, eq=False)
class Masking(Defense):
    """Attention may not read positions that look damaged: a share over `tolerance` of their entries is out of range."""

    statistics: CacheStatistics
    tolerance: float = 0.01

    def read(self, damaged: CachedTokens, kept: None) -> CachedTokens:
        outside = [
            by_slot(x, damaged.valid, ranges, lambda x, clean: ((x < clean.low) | (x > clean.high)).to(x.dtype))
            for x, ranges in ((damaged.k, self.statistics.k), (damaged.v, self.statistics.v))
        ]
        share = torch.stack([x.mean((1, 2, 4)) for x in outside]).mean(0)
        return replace(damaged, readable=share <= self.tolerance)


@dataclass(frozen=True, eq=False)
class ClipRenormalise(Defense):
    """Clips channels to `width` standard deviations, then restores the vector's norm, up to the largest clean one."""

    statistics: CacheStatistics
    width: float = 3.0

    def read(self, damaged: CachedTokens, kept: None) -> CachedTokens:
        return replace(
            damaged,
            k=by_slot(damaged.k, damaged.valid, self.statistics.k, self._clip),
            v=by_slot(damaged.v, damaged.valid, self.statistics.v, self._clip),
        )

    def _clip(self, x: torch.Tensor, clean: Range) -> torch.Tensor:
        margin = self.width * clean.std
        clipped = x.clamp(clean.mean - margin, clean.mean + margin)
        norm = torch.minimum(x.norm(dim=-1, keepdim=True), clean.norm)
        return clipped * (norm / clipped.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))


@dataclass(frozen=True, eq=False)
class RangeRestriction(Defense):
    """Clips every channel to the range that it had in clean caches (Ranger, Chen et al. 2020, for caches)."""

    statistics: CacheStatistics

    def read(self, damaged: CachedTokens, kept: None) -> CachedTokens:
        return replace(
            damaged,
            k=by_slot(damaged.k, damaged.valid, self.statistics.k, self._clip),
            v=by_slot(damaged.v, damaged.valid, self.statistics.v, self._clip),
        )

    def _clip(self, x: torch.Tensor, clean: Range) -> torch.Tensor:
        return x.clamp(clean.low, clean.high)


@register_defense("masking")
def _masking(calibration: Calibration) -> Defense:
    return Masking(calibration.statistics)


@register_defense("clip_renormalise")
def _clip_renormalise(calibration: Calibration) -> Defense:
    return ClipRenormalise(calibration.statistics)


@register_defense("range_restriction")
def _range_restriction(calibration: Calibration) -> Defense:
    return RangeRestriction(calibration.statistics)


BLIND = ("none", "reset", "smoothing", "dropout", "masking", "clip_renormalise", "range_restriction")


def blind_defenses(calibration: Calibration) -> dict[str, Defense]:
    """Every blind defense by name, `none` first."""
    return {name: DEFENSES[name](calibration) for name in BLIND}


# --- oracles and references -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnDamaged(Defense):
    """A blind defense that knows which entries are damaged and leaves all others alone."""

    blind: Defense

    def write(self, clean: CachedTokens) -> CachedTokens:
        return clean

    def read(self, damaged: CachedTokens, kept: CachedTokens) -> CachedTokens:
        hit = damaged_vectors(kept, damaged)
        read = self.blind.read(damaged, None)
        readable = None if read.readable is None else read.readable | ~hit.any(2).any(1)
        k = torch.where(hit[..., None], read.k, damaged.k)
        v = torch.where(hit[..., None], read.v, damaged.v)
        return replace(damaged, k=k, v=v, readable=readable)


@register_defense("prefill")
class Prefill(Defense):
    """Prefills the whole text again: reads the clean cache, at the price of a prefill."""

    @property
    def prefill_share(self) -> float:
        return 1.0

    def write(self, clean: CachedTokens) -> CachedTokens:
        return clean

    def read(self, damaged: CachedTokens, kept: CachedTokens) -> CachedTokens:
        return kept


@register_defense("erase_damaged")
def _erase_damaged(calibration: Calibration) -> Defense:
    return OnDamaged(Reset())


@register_defense("smoothing_oracle")
def _smoothing_oracle(calibration: Calibration) -> Defense:
    return OnDamaged(Smoothing())


@register_defense("clip_renormalise_oracle")
def _clip_renormalise_oracle(calibration: Calibration) -> Defense:
    return OnDamaged(ClipRenormalise(calibration.statistics))


@register_defense("range_restriction_oracle")
def _range_restriction_oracle(calibration: Calibration) -> Defense:
    return OnDamaged(RangeRestriction(calibration.statistics))


ORACLES = ("prefill", "erase_damaged", "smoothing_oracle", "clip_renormalise_oracle", "range_restriction_oracle")


def oracles(calibration: Calibration) -> dict[str, Defense]:
    """The heuristics that know the damaged entries, and the references.

    `erase_damaged` erases exactly the positions at which any entry is damaged; `reset` above erases everything.
    """
    return {name: DEFENSES[name](calibration) for name in ORACLES}


def damaged_vectors(clean: CachedTokens, damaged: CachedTokens) -> torch.Tensor:
    """The vectors of which a key or a value differs from the clean one, bool [B, L, G, T]."""
    return (clean.k != damaged.k).any(-1) | (clean.v != damaged.v).any(-1)
