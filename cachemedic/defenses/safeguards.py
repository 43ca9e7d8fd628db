"""Safeguards: what is kept of a cache when it is written, where the faults do not reach, to read it when damaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from cachemedic.defenses.heuristics import Defended
from cachemedic.models.shape import ModelShape

WORD_BITS = 16  # a bf16 cache is what the bytes of a safeguard are compared with
PLAUSIBLE = torch.finfo(torch.float16).max


class Safeguard(ABC):
    """Keeps something of a clean cache and reads the damaged one with its help."""

    @property
    def runs(self) -> int:
        """How many trained runs read the rows of a batch, a block of rows each."""
        return 1

    @abstractmethod
    def bits_per_token(self) -> float:
        """The protected side storage in bits per cached token: all layers, heads, keys and values of the model."""

    @abstractmethod
    def write(self, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor) -> Any:
        """What is kept of the clean k, v [B, L, G, T, d] of the tokens ids [B, T].

        `valid` [B, T] tells the cached positions from the padding on their left.
        """

    @abstractmethod
    def read(self, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor, kept: Any) -> Defended:
        """What attention reads of the damaged k, v [B, L, G, T, d], given what was `kept`."""


def share_of_cache(safeguard: Safeguard, shape: ModelShape) -> float:
    """The bytes of a safeguard as a share of those of a bf16 cache."""
    return safeguard.bits_per_token() / cache_bits_per_token(shape)


def cache_bits_per_token(shape: ModelShape) -> int:
    """The size of one token in a bf16 cache, keys and values of all layers, in bits."""
    return WORD_BITS * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim


def plausible(x: torch.Tensor) -> torch.Tensor:
    """x with zero for NaN and for what is beyond the range of fp16, which no clean key or value comes near.

    One flipped exponent bit makes such values, and a single one poisons every later token, masked or not.
    """
    return torch.where(x.abs() <= PLAUSIBLE, x, 0.0)
