"""Rivals of learned repair: what memory systems and plain compression do with as many protected bytes.

Nothing is trained; low-rank copies and ranges are calibrated on clean caches. All read values that no clean cache holds
as zero (`plausible`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cachemedic.core.errors import nearest_valid
from cachemedic.defenses.clean_ranges import CacheStatistics
from cachemedic.defenses.ecc import CHECK_BITS, VALUES_PER_WORD, correct, encode, from_words, stored_words
from cachemedic.defenses.heuristics import Defended, RangeRestriction
from cachemedic.defenses.safeguards import WORD_BITS, Safeguard, cache_bits_per_token, plausible
from cachemedic.defenses.shadows import Cache, Checksummed, GroupQuantisedShadow, LowRankShadow, directions
from cachemedic.models.shape import ModelShape

CHECK_BIT_PLACES = ("protected", "in_page")
SHADOW_BITS = (1, 2, 4)
LOW_RANK_SHARES = {"low_rank_shadow": 1 / 8, "low_rank_shadow_6pct": 1 / 16, "low_rank_shadow_3pct": 1 / 32}
RECOMPUTED_LAYERS = 2


@dataclass(frozen=True)
class SecdedEcc(Safeguard):
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

    def bits_per_token(self) -> float:
        return cache_bits_per_token(self.shape) * CHECK_BITS / (VALUES_PER_WORD * WORD_BITS)

    def write(self, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor) -> Cache:
        return encode(stored_words(k)), encode(stored_words(v))

    def read(self, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor, kept: Cache) -> Defended:
        words = stored_words(k), stored_words(v)
        syndromes = [encode(x) ^ written for x, written in zip(words, kept, strict=True)]
        if self.check_bits == "in_page":
            mismatching = torch.stack([(s != 0).float().mean((2, 4), keepdim=True) for s in syndromes]).mean(0)
            syndromes = [s.masked_fill(mismatching > self.REWRITTEN, 0) for s in syndromes]
        return Defended(*(_decode(*parts) for parts in zip((k, v), words, syndromes, strict=True)))


def _decode(x: torch.Tensor, words: torch.Tensor, syndrome: torch.Tensor) -> torch.Tensor:
    decoded = correct(words, syndrome)
    return plausible(torch.where(decoded == words, x, from_words(decoded, x.dtype)))


@dataclass(frozen=True, eq=False)
class Restricted(Safeguard):
    """What a safeguard reads, clipped to the ranges of clean caches: for no more bytes, but not exact on clean ones.

    Bounds what a code does when it miscorrects.
    """

    safeguard: Safeguard
    restriction: RangeRestriction

    def bits_per_token(self) -> float:
        return self.safeguard.bits_per_token()

    def write(self, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor) -> Any:
        return self.safeguard.write(k, v, ids, valid)

    def read(self, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor, kept: Any) -> Defended:
        found = self.safeguard.read(k, v, ids, valid, kept)
        return replace(self.restriction(found.k, found.v, valid), keep=found.keep)


@dataclass(frozen=True)
class ChecksumErase(Checksummed):
    """Attention does not read a token that is damaged in any layer."""

    def copy_bits(self) -> float:
        return 0.0

    def copy(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Cache:
        return k.new_zeros(()), v.new_zeros(())

    def repair(self, damaged: torch.Tensor, k: torch.Tensor, v: torch.Tensor, copy: Cache) -> Defended:
        return replace(super().repair(damaged, k, v, copy), keep=~damaged.any(1))


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
    def recompute_share(self) -> float:
        """The latency of a read as a share of a prefill where every token is damaged.

        Where a share of the tokens is, that share of it. One layer's projections to keys and values are not counted.
        """
        return self.layers / self.shape.num_layers

    def copy_bits(self) -> float:
        return 0.0

    def copy(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> Cache:
        return k, v

    def repair(self, damaged: torch.Tensor, k: torch.Tensor, v: torch.Tensor, copy: Cache) -> Defended:
        computed = torch.arange(damaged.shape[1], device=damaged.device) <= self.layers
        return super().repair(damaged & computed[:, None], k, v, copy)


def rivals(k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor, shape: ModelShape) -> dict[str, Safeguard]:
    """Every rival by name, from clean k, v [N, L, G, T, d] and valid [N, T] of a calibration split.

    A low-rank copy whose bytes do not pay for one direction (small heads) is left out.
    """
    restriction = RangeRestriction(CacheStatistics.measure(k, v, valid))
    found: dict[str, Safeguard] = {
        "secded_ecc": SecdedEcc(shape),
        "secded_ecc_in_page": SecdedEcc(shape, "in_page"),
        "secded_ecc_restricted": Restricted(SecdedEcc(shape, "in_page"), restriction),
        "checksum_erase": ChecksumErase(shape),
        "checksum_recompute": ChecksumRecompute(shape, shape.num_layers - 1),
    }
    if shape.num_layers - 1 > RECOMPUTED_LAYERS:
        found[f"checksum_recompute_{RECOMPUTED_LAYERS}"] = ChecksumRecompute(shape, RECOMPUTED_LAYERS)
    found |= {f"shadow_{bits}bit": GroupQuantisedShadow(shape, bits) for bits in SHADOW_BITS}
    for name, share in LOW_RANK_SHARES.items():
        if directions(shape, share) > 0:
            found[name] = LowRankShadow.fit(k, v, valid, shape, share)
    return found
