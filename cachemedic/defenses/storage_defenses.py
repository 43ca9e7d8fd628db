"""What memory systems and plain compression do with as many protected bytes as learned repair takes.

Nothing is trained; low-rank copies and ranges are calibrated on clean caches. All read values that no clean cache holds
as zero (`plausible`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cachemedic.core.errors import nearest_valid
from cachemedic.defenses.clean_ranges import plausible
from cachemedic.defenses.defense import WORD_BITS, Around, CachedTokens, Defense, cache_bytes_per_token
from cachemedic.defenses.ecc import CHECK_BITS, VALUES_PER_WORD, correct, encode, from_words, stored_words
from cachemedic.defenses.heuristics import RangeRestriction
from cachemedic.defenses.registry import DEFENSES, Calibration, register_defense
from cachemedic.defenses.shadows import Checksummed, GroupQuantisedShadow, KeysValues, LowRankShadow, directions
from cachemedic.models.shape import ModelShape

CHECK_BIT_PLACES = ("protected", "in_page")
SHADOW_BITS = (1, 2, 4)
LOW_RANK_SHARES = {"low_rank_shadow": 1 / 8, "low_rank_shadow_6pct": 1 / 16, "low_rank_shadow_3pct": 1 / 32}
RECOMPUTED_LAYERS = 2


@dataclass(frozen=True)
class SecdedEcc(Defense):
    """SECDED error correction of the stored words: a single flipped bit in four values is put right.

    A word that the code finds uncorrectable is read as zeros. Values that the decoder leaves alone pass bit for bit,
    those it changes come back as stored (bf16). The check bits are "protected", out of reach of all faults, which
    favours the code, or "in_page", where real memory has them: whatever rewrites a token as a whole (an overwrite, a
    swapped or stale page, a change of every value) brings matching check bits along and is never seen. Flips of the
    check bits themselves are not simulated in either place.
    """

    shape: ModelShape
    check_bits: str = "protected"

    REWRITTEN = 0.75  # a token of more mismatching words was rewritten: as many by flips need 1 bit in 47 flipped

    def __post_init__(self) -> None:
        if self.check_bits not in CHECK_BIT_PLACES:
            raise nearest_valid("place of the check bits", self.check_bits, CHECK_BIT_PLACES)

    @property
    def bytes_per_token(self) -> float:
        return cache_bytes_per_token(self.shape) * CHECK_BITS / (VALUES_PER_WORD * WORD_BITS)

    def write(self, clean: CachedTokens) -> KeysValues:
        return encode(stored_words(clean.k)), encode(stored_words(clean.v))

    def read(self, damaged: CachedTokens, kept: KeysValues) -> CachedTokens:
        stored = damaged.k, damaged.v
        words = stored_words(damaged.k), stored_words(damaged.v)
        syndromes = [encode(x) ^ written for x, written in zip(words, kept, strict=True)]
        if self.check_bits == "in_page":
            mismatching = torch.stack([(s != 0).float().mean((2, 4), keepdim=True) for s in syndromes]).mean(0)
            syndromes = [s.masked_fill(mismatching > self.REWRITTEN, 0) for s in syndromes]
        k, v = (_decode(*parts) for parts in zip(stored, words, syndromes, strict=True))
        return replace(damaged, k=k, v=v)


def _decode(x: torch.Tensor, words: torch.Tensor, syndrome: torch.Tensor) -> torch.Tensor:
    decoded = correct(words, syndrome)
    return plausible(torch.where(decoded == words, x, from_words(decoded, x.dtype)))


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
    """Every defense of this module by name, but for those that do not fit the model.

    Left out are a low-rank copy whose bytes do not pay for one direction (small heads), and the recomputation of few
    layers of a model that has not more.
    """
    shape = calibration.shape
    names = ["secded_ecc", "secded_ecc_in_page", "secded_ecc_restricted", "checksum_erase"]
    names += [FEW_LAYERS] if shape.num_layers - 1 > RECOMPUTED_LAYERS else []
    names += SHADOWS
    names += [name for name, share in LOW_RANK_SHARES.items() if directions(shape, share) > 0]
    return {name: DEFENSES[name](calibration) for name in names}
