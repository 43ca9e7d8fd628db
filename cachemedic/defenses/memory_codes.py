"""Error-correcting codes of memory as defenses: each vector of a head is coded, and decoded when it is read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cachemedic.core.errors import nearest_valid
from cachemedic.core.keys_values import KeysValues
from cachemedic.defenses import ecc, golay
from cachemedic.defenses.clean_ranges import plausible
from cachemedic.defenses.defense import WORD_BITS, CachedTokens, Defense, cache_bytes_per_token
from cachemedic.defenses.ecc import from_words, stored_words
from cachemedic.models.shape import ModelShape

CHECK_BIT_PLACES = ("protected", "in_page")


@dataclass(frozen=True)
class MemoryCode(Defense):
    """Error correction of the stored words: few flipped bits in a code word are put right.

    Data that the code finds uncorrectable is read as zeros. Values that the decoder leaves alone pass bit for bit,
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

    @abstractmethod
    def encode(self, words: Tensor) -> Tensor:
        """The check bits [..., n] of the words [..., d] of vectors, linear: those of a ^ b are those of a ^ of b."""

    @abstractmethod
    def correct(self, words: Tensor, syndrome: Tensor) -> Tensor:
        """Words [..., d] as the decoder returns them; syndrome [..., n]: check bits found ^ check bits written."""

    def mismatching(self, syndrome: Tensor) -> Tensor:
        """Which blocks of three or four values are not as they were written, bool [..., blocks]."""
        return syndrome != 0

    def write(self, clean: CachedTokens) -> KeysValues:
        return self.encode(stored_words(clean.k)), self.encode(stored_words(clean.v))

    def read(self, damaged: CachedTokens, kept: KeysValues) -> CachedTokens:
        stored = damaged.k, damaged.v
        words = stored_words(damaged.k), stored_words(damaged.v)
        syndromes = [self.encode(x) ^ written for x, written in zip(words, kept, strict=True)]
        if self.check_bits == "in_page":
            shares = [self.mismatching(s).float().mean((2, 4), keepdim=True) for s in syndromes]
            rewritten = torch.stack(shares).mean(0) > self.REWRITTEN
            syndromes = [s.masked_fill(rewritten, 0) for s in syndromes]
        k, v = (self._decode(*parts) for parts in zip(stored, words, syndromes, strict=True))
        return replace(damaged, k=k, v=v)

    def _decode(self, x: Tensor, words: Tensor, syndrome: Tensor) -> Tensor:
        decoded = self.correct(words, syndrome)
        return plausible(torch.where(decoded == words, x, from_words(decoded, x.dtype)))


@dataclass(frozen=True)
class SecdedEcc(MemoryCode):
    """SECDED: a single flipped bit in four values is put right, and two are seen, for an eighth of the bytes."""

    @property
    def bytes_per_token(self) -> float:
        return cache_bytes_per_token(self.shape) * ecc.CHECK_BITS / (ecc.VALUES_PER_WORD * WORD_BITS)

    def encode(self, words: Tensor) -> Tensor:
        return ecc.encode(words)

    def correct(self, words: Tensor, syndrome: Tensor) -> Tensor:
        return ecc.correct(words, syndrome)


@dataclass(frozen=True)
class GolayEcc(MemoryCode):
    """The extended Golay code: three flipped bits of 24 are put right, and four are seen, for as many bytes again.

    Protected check bits of this code are a second copy: whoever knew that they are sound could do without the data.
    This decoder does not know it.
    """

    @property
    def bytes_per_token(self) -> float:
        vectors = 2 * self.shape.num_layers * self.shape.num_kv_heads
        return vectors * golay.symbol_count(self.shape.head_dim) * golay.SYMBOL_BITS / 8

    def encode(self, words: Tensor) -> Tensor:
        return golay.encode(words)

    def correct(self, words: Tensor, syndrome: Tensor) -> Tensor:
        return golay.correct(words, syndrome)

    def mismatching(self, syndrome: Tensor) -> Tensor:
        groups = F.pad(syndrome, (0, -syndrome.shape[-1] % golay.SYMBOLS)).unflatten(-1, (-1, golay.SYMBOLS))
        return (groups != 0).any(-1)
