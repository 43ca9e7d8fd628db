"""A universal hash of what a cache stores: which tokens, which layers, keys or values, are not what was written.

The numbers of a token in one layer, read as whole numbers w of 16 bits, are hashed to the integer h = sum of a w, with
secret multipliers a of b bits (Carter and Wegman 1979). The sum is a matrix product in double precision, which is exact
because it stays below 2^53: the same on every device and for every batch.

- A change within one 16-bit number is seen with certainty: 0 < a |w - w'| .
- Any other change of the keys, or of the values, of one layer leaves h as it was with probability at most 2^-b, for
  whatever change was made without knowledge of the multipliers; b = 38 - log2(16-bit numbers of a layer), 27 to 30 for
  common models.

Kept are, a token, one number of 64 bits for all layers (h, times odd constants, added up modulo 2^64: this adds less
than 2^-40) and 16 bits for the keys and for the values of each layer, which say where the change is. One of those fails
to point to a changed layer with probability 2^-15; the token is seen to be changed all the same. `believed` says what
to make of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_BITS, WORD_BITS = 53, 15  # of a double; of the magnitude of a signed 16-bit number
HASH_BYTES, PART_BYTES = 8, 4  # of a token; of its keys and values in one layer
ALL_OVER = 0.9  # of the keys and values of a token
LARGEST = 2.0**16  # no model writes a number of this size
GROUP = 256  # tokens, over rows and layers, that are hashed in one product: many layers of few tokens, or one of many


@dataclass(frozen=True, eq=False)
class Hashes:
    """Of T tokens in B rows. whole, int64 [B, T]: all layers; parts, int16 [B, T, L, 2]: keys and values by layer."""

    whole: Tensor
    parts: Tensor

    def rows(self, choose: Callable[[Tensor], Tensor]) -> Hashes:
        """The same of other rows; `choose` picks them along the first axis of a tensor."""
        return Hashes(choose(self.whole), choose(self.parts))

    def tokens(self, tokens: slice) -> Hashes:
        """The same of some tokens."""
        return Hashes(self.whole[:, tokens], self.parts[:, tokens])

    def then(self, new: Hashes) -> Hashes:
        """With new tokens behind these."""
        return Hashes(torch.cat([self.whole, new.whole], 1), torch.cat([self.parts, new.parts], 1))

    def replaced(self, tokens: Tensor, new: Hashes) -> Hashes:
        """With the hashes `new` [B, T] in place of those of `tokens`, bool [B, T]."""
        return Hashes(
            torch.where(tokens, new.whole, self.whole), torch.where(tokens[..., None, None], new.parts, self.parts)
        )


class TokenHash:
    """The hash of caches of L layers with G heads of d numbers; `seed` draws its secret.

    Raises `ValueError` for layers too wide for an exact sum (more than 2^30 numbers of 16 bits).
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> None:
        self.words = max(1, dtype.itemsize // 2) * head_dim  # a head
        self.bits = EXACT_BITS - WORD_BITS - (num_kv_heads * self.words - 1).bit_length()
        if self.bits < 8:
            raise ValueError(f"{num_kv_heads} heads of {head_dim} numbers are too many to be hashed exactly")
        generator = torch.Generator().manual_seed(seed)
        multipliers = torch.randint(1, 2**self.bits, (num_kv_heads, self.words, 1), generator=generator)
        self.multipliers = multipliers.double()  # the same in every layer: content is known again wherever it lies
        odd = torch.randint(-(2**62), 2**62, (num_layers, 2, 2), generator=generator) * 2 + 1
        self.of_place = odd[..., 0]  # [L, 2]: the share of keys and values of each layer in the whole
        self.of_part = odd[0, 0, 1]

    def sums(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """h, int64 [B, T, L', 2], of the keys and values [B, G, T, d] of some layers."""
        sides = [x for pair in zip(keys, values, strict=True) for x in pair]
        if len(formats := {str(x.dtype) for x in sides}) > 1:  # some models write both under torch.autocast
            raise ValueError(
                f"a cache must hold numbers of one format, not {' and '.join(sorted(formats))}: cast the model"
            )
        rows, _, tokens, _ = sides[0].shape
        size = max(1, GROUP // (rows * tokens))
        multipliers = self.multipliers.flatten().to(sides[0].device)
        heads, width = self.multipliers.shape[:2]
        # one buffer for all groups: it stays in the processor's cache
        exact = torch.empty(size * rows * tokens, heads * width, dtype=torch.double, device=multipliers.device)
        found = []
        for start in range(0, len(sides), size):
            group = sides[start : start + size]
            buffer = exact[: len(group) * rows * tokens]
            for x, place in zip(group, buffer.view(-1, rows, tokens, heads, width), strict=True):
                place.copy_(_words(x).transpose(1, 2))
            found.append(buffer @ multipliers)
        return torch.cat(found).long().view(len(keys), 2, rows, tokens).permute(2, 3, 0, 1)

    def by_head(self, x: Tensor) -> Tensor:
        """What head g adds to h when it lies in place j: int64 [G, G, n] (g, j) of tokens x [n, G, d]."""
        words = _words(x).double().transpose(0, 1)  # [G, n, words]
        return (words[:, None] @ self.multipliers.to(x.device)).squeeze(-1).long()

    def finish(self, sums: Tensor) -> Hashes:
        """What is kept of h [B, T, L, 2] of all layers."""
        return Hashes((sums * self.of_place.to(sums.device)).sum((2, 3)), self.parts(sums))

    def parts(self, sums: Tensor) -> Tensor:
        """The 16 bits, int16, that are kept of each h."""
        return ((sums * self.of_part.to(sums.device)) >> 48).short()

    def of(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Hashes:
        """The hashes of the keys and values [B, G, T, d] of all layers."""
        return self.finish(self.sums(keys, values))


def believed(agree: Tensor, largest: Tensor) -> Tensor:
    """Which parts of changed tokens are held to be as they were written, bool [..., L, 2].

    agree: those whose short hashes are what was written, some of them by chance. Not believed are all parts of a token
    with damage all over, and parts with a number that no model writes; largest [..., L, 2]: the largest magnitude.
    """
    over = (~agree).flatten(-2).float().mean(-1) >= ALL_OVER
    return agree & ~over[..., None, None] & (largest < LARGEST)  # what is not a number is not smaller either


def _words(x: Tensor) -> Tensor:
    """The stored bits of x [..., d] as signed whole numbers [..., words] of 16 bits, or of 8 where it has no more."""
    return (x if x.stride(-1) == 1 else x.contiguous()).view(torch.int8 if x.dtype.itemsize == 1 else torch.int16)
