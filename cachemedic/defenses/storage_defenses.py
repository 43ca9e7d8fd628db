"""What memory systems and plain compression do with as many protected bytes as learned repair takes.

Nothing is trained; low-rank copies and ranges are calibrated on clean caches. All read values that no clean cache holds
as zero (`plausible`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cachemedic.core.keys_values import KeysValues
from cachemedic.defenses.defense import Around, CachedTokens, Defense
from cachemedic.defenses.heuristics import RangeRestriction
from cachemedic.defenses.memory_codes import GolayEcc, SecdedEcc
from cachemedic.defenses.registry import DEFENSES, Calibration, register_defense
from cachemedic.defenses.shadows import Checksummed, GroupQuantisedShadow, LowRankShadow, directions

SHADOW_BITS = (1, 2, 4)
LOW_RANK_SHARES = {"low_rank_shadow": 1 / 8, "low_rank_shadow_6pct": 1 / 16, "low_rank_shadow_3pct": 1 / 32}
RECOMPUTED_LAYERS = 2


@dataclass(frozen=True, eq=False)
class Restricted(Around):
    """What another defense reads, clipped to clean ranges: for no more bytes, but not exact on clean caches.

    Bounds what a code does when it miscorrects.
    """

    restriction: RangeRestriction

    def read(self, damaged: CachedTokens, kept: object) -> CachedTokens:
        return self.restriction.read(self.inner.read(damaged, kept), None)


@dataclass(frozen=True)
class ChecksumErase(Checksummed):
    """Attention does not read a token that is damaged in any layer."""

    def copy_bits(self) -> float:
        return 0.0

    def copy(self, clean: CachedTokens) -> KeysValues:
        return clean.k.new_zeros(()), clean.v.new_zeros(())

    def repair(self, hit: torch.Tensor, tokens: CachedTokens, copy: KeysValues) -> CachedTokens:
        return replace(super().repair(hit, tokens, copy), readable=~hit.any(1))


@dataclass(frozen=True)
class ChecksumRecompute(Checksummed):
    """Damaged tokens are computed again from the token ids; what the memory below holds soundly is used as it is.

    Running `layers` of the L layers gives the keys and values of one layer more, 0 to `layers`, exactly: the copy that
    is passed on stands for that computation and is not stored. Tokens damaged in deeper layers stay as read.
    """

    layers: int

    def __post_init__(self) -> None:
        last = self.shape.num_layers - 1
        if not 0 <= self.layers <= last:
            raise ValueError(f"layers {self.layers} is out of range: 0 to {last}, one less than the model has")

    @property
    def prefill_share(self) -> float:
        """One layer's projections to keys and values are not counted."""
        return self.layers / self.shape.num_layers

    def copy_bits(self) -> float:
        return 0.0

    def copy(self, clean: CachedTokens) -> KeysValues:
        return clean.k, clean.v

    def repair(self, hit: torch.Tensor, tokens: CachedTokens, copy: KeysValues) -> CachedTokens:
        computed = torch.arange(hit.shape[1], device=hit.device) <= self.layers
        return super().repair(hit & computed[:, None], tokens, copy)


@register_defense("secded_ecc")
def _secded_ecc(calibration: Calibration) -> Defense:
    return SecdedEcc(calibration.shape)


@register_defense("secded_ecc_in_page")
def _secded_ecc_in_page(calibration: Calibration) -> Defense:
    return SecdedEcc(calibration.shape, "in_page")


@register_defense("golay_ecc")
def _golay_ecc(calibration: Calibration) -> Defense:
    return GolayEcc(calibration.shape)


@register_defense("golay_ecc_in_page")
def _golay_ecc_in_page(calibration: Calibration) -> Defense:
    return GolayEcc(calibration.shape, "in_page")


@register_defense("secded_ecc_restricted")
def _secded_ecc_restricted(calibration: Calibration) -> Defense:
    return Restricted(SecdedEcc(calibration.shape, "in_page"), RangeRestriction(calibration.statistics))


@register_defense("checksum_erase")
def _checksum_erase(calibration: Calibration) -> Defense:
    return ChecksumErase(calibration.shape)


@register_defense(FEW_LAYERS := f"checksum_recompute_{RECOMPUTED_LAYERS}")
def _checksum_recompute_few(calibration: Calibration) -> Defense:
    return ChecksumRecompute(calibration.shape, RECOMPUTED_LAYERS)


def _register_shadow(bits: int) -> str:
    @register_defense(name := f"shadow_{bits}bit")
    def shadow(calibration: Calibration) -> Defense:
        return GroupQuantisedShadow(calibration.shape, bits)

    return name


def _register_low_rank_shadow(name: str, share: float) -> None:
    @register_defense(name)
    def shadow(calibration: Calibration) -> Defense:
        return LowRankShadow.fit(calibration.clean, calibration.shape, share)


SHADOWS = tuple(_register_shadow(bits) for bits in SHADOW_BITS)
for _name, _share in LOW_RANK_SHARES.items():
    _register_low_rank_shadow(_name, _share)


def storage_defenses(calibration: Calibration) -> dict[str, Defense]:
    """Every defense of this module by name, but for those that take as many bytes as the cache or do not fit the model.

    Left out are the Golay codes, a low-rank copy whose bytes do not pay for one direction (small heads), and the
    recomputation of few layers of a model that has not more.
    """
    shape = calibration.shape
    names = ["secded_ecc", "secded_ecc_in_page", "secded_ecc_restricted", "checksum_erase"]
    names += [FEW_LAYERS] if shape.num_layers - 1 > RECOMPUTED_LAYERS else []
    names += SHADOWS
    names += [name for name, share in LOW_RANK_SHARES.items() if directions(shape, share) > 0]
    return {name: DEFENSES[name](calibration) for name in names}
