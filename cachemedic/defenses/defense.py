"""One interface for whatever is done about a damaged cache: a heuristic, an oracle, a code, a copy, an operator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.models.shape import ModelShape

WORD_BITS = 16  # the bytes that a defense keeps are compared with those of a bf16 cache


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """T cached tokens of B rows, and what is known about them.

    k, v [B, L, G, T, d]: keys (rotated, as stored) and values of L layers and G key/value heads. ids [B, T]: the token
    ids. positions [B, T]: the position of each token in its text, -1 for padding. readable, bool [B, T]: the tokens
    that attention may read (None: all but the padding). damaged, bool [B, T]: the tokens that are known to be damaged,
    by a checksum of the memory or in an experiment by an oracle (None: nothing is known; a defense that needs to know
    finds it out from what it kept).
    """

    k: Tensor
    v: Tensor
    ids: Tensor
    positions: Tensor
    readable: Tensor | None = None
    damaged: Tensor | None = None

    @classmethod
    def behind_padding(cls, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor) -> CachedTokens:
        """Tokens that are counted from the first `valid` one of each row; valid, bool [B, T], is False for padding."""
        return cls(k, v, ids, (valid.long().cumsum(1) - 1).masked_fill(~valid, -1))

    def to(self, device: torch.device) -> CachedTokens:
        """The same on a device."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if x is not None})

    @property
    def valid(self) -> Tensor:
        """Which tokens are no padding, bool [B, T]."""
        return self.positions >= 0


class Defense:
    """Keeps something of a cache when it is written, and reads the damaged cache with its help.

    A subclass overrides what it does: `write` and `read` for what acts on the stored cache, `attach` for what acts
    inside attention. As it stands, the base class keeps nothing and reads the cache as it is.
    """

    def write(self, clean: CachedTokens) -> Any:
        """What is kept of a cache as it is written, where faults do not reach; None for nothing."""
        return None

    def read(self, damaged: CachedTokens, kept: Any) -> CachedTokens:
        """The cache that the model shall read, given what `write` kept. Leaves `damaged` as it is."""
        return damaged

    def attach(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """A context within which the model reads any cache through this defense."""
        return nullcontext()

    @property
    def bytes_per_token(self) -> float:
        """What is kept of each token in bytes: all layers, heads, keys and values of the model together."""
        return 0.0

    @property
    def cache_bytes(self) -> int:
        """What is kept of each row of a cache beside that, whatever its length, in bytes."""
        return 0

    @property
    def fixed_bytes(self) -> int:
        """What is kept once, for all caches of a model, in bytes."""
        return 0

    @property
    def prefill_share(self) -> float:
        """The time that a read takes, as a share of a prefill of the damaged tokens; 0 if it takes no forward pass."""
        return 0.0

    @property
    def runs(self) -> int:
        """R trained runs read R equal blocks of the rows of a batch; 1 if all rows are treated alike."""
        return 1


@dataclass(frozen=True, eq=False)
class Around(Defense):
    """Another defense of which a subclass changes what it keeps or what it reads."""

    inner: Defense

    def write(self, clean: CachedTokens) -> Any:
        return self.inner.write(clean)

    def read(self, damaged: CachedTokens, kept: Any) -> CachedTokens:
        return self.inner.read(damaged, kept)

    def attach(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        return self.inner.attach(model)

    @property
    def bytes_per_token(self) -> float:
        return self.inner.bytes_per_token

    @property
    def cache_bytes(self) -> int:
        return self.inner.cache_bytes

    @property
    def fixed_bytes(self) -> int:
        return self.inner.fixed_bytes

    @property
    def prefill_share(self) -> float:
        return self.inner.prefill_share

    @property
    def runs(self) -> int:
        return self.inner.runs


def cache_bytes_per_token(shape: ModelShape) -> int:
    """The size of one token in a bf16 cache, keys and values of all layers, in bytes."""
    return WORD_BITS // 8 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
