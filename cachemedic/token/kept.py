"""What codes and ids predict of the tokens of a cache, and what family E keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cachemedic.token.hashes import Hashes, TokenHash, believed
from cachemedic.token.joint import SINKS, Prior


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is predicted of tokens [B, T] before they are read: c [B, T, n], n = 0 without codes; their prior, None
    without ids; coded [B, T] bool: whether c comes from a code.
    """

    c: Tensor
    prior: Prior | None
    coded: Tensor

    def tokens(self, tokens: Tensor) -> Prediction:
        """Of some of the tokens."""
        prior = None if self.prior is None else self.prior.tokens(tokens)
        return Prediction(self.c[:, tokens], prior, self.coded[:, tokens])


@dataclass(frozen=True, eq=False)
class Kept:
    """What family E keeps of T tokens: codes uint8 [B, T, bytes], hashes, sinks [2, B, L, G, SINKS, d] as written.

    Of a cache that is stored in few bits on purpose codes are all: hashes would match nowhere, and first positions in
    full cost more than they save.
    """

    codes: Tensor
    hashes: Hashes | None = None
    sinks: Tensor | None = None

    def rows(self, rows: Tensor) -> Kept:
        """The same of some rows of the batch."""
        hashes = None if self.hashes is None else self.hashes.rows(lambda x: x[rows])
        return Kept(self.codes[rows], hashes, None if self.sinks is None else self.sinks[:, rows])

    def sound(self, keys: Tensor, values: Tensor, layers: Sequence[int]) -> Tensor | None:
        """Which keys and values of tokens, bool [B, T, L', 2], are what was written; [B, L, G, T, d] of all layers.

        None without hashes: nothing is known to be.
        """
        if self.hashes is None:
            return None
        now = hashes_of(keys, values, layers)
        agree, changed = now.parts == self.hashes.parts, now.whole != self.hashes.whole
        agree &= ~agree.flatten(2).all(2)[..., None, None]  # of a changed token: one of them agrees by chance
        largest = [x[:, list(layers)].abs().amax((2, 4)).transpose(1, 2) for x in (keys, values)]
        return torch.where(changed[..., None, None], believed(agree, torch.stack(largest, -1)), True)


def hashes_of(keys: Tensor, values: Tensor, layers: Sequence[int]) -> Hashes:
    """The hashes of some layers of keys and values [B, L, G, T, d]."""
    hasher = TokenHash(len(layers), keys.shape[2], keys.shape[4], keys.dtype, seed=0)
    return hasher.of(*([side[:, layer] for layer in layers] for side in (keys, values)))


def kept_sinks(keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """The numbers [2, B, L, G, SINKS, d] of the tokens at the first positions; positions [B, T], -1 for padding."""
    at = torch.arange(SINKS, device=positions.device)
    slots = (positions[:, None] == at[:, None]).int().argmax(-1)[:, None, None, :, None]
    chosen = [x.gather(3, slots.expand(*x.shape[:3], SINKS, x.shape[-1])) for x in (keys, values)]
    return torch.stack(chosen)


def with_sinks(x: Tensor, sinks: Tensor, positions: Tensor) -> Tensor:
    """x [B, L, G, T, d] with the numbers kept of the first positions, [B, L, G, SINKS, d]."""
    place = positions.clamp(0, SINKS - 1)[:, None, None, :, None].expand(*x.shape[:4], x.shape[-1])
    held = ((positions >= 0) & (positions < SINKS))[:, None, None, :, None]
    return torch.where(held, sinks.gather(3, place), x)
