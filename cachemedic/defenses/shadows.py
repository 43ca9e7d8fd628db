"""Checksums with a second, coarse copy of the cache, from which damaged tokens are read.

A checksum covers one token in one layer, keys and values of all heads: damage is found token by token.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch

from cachemedic.core.keys_values import KeysValues
from cachemedic.core.quantise import cache_bits, extremes, quantise_cache
from cachemedic.defenses.clean_ranges import is_first, plausible
from cachemedic.defenses.defense import WORD_BITS, CachedTokens, Defense, cache_bytes_per_token
from cachemedic.defenses.ecc import CHECKSUM_BITS, token_checksums
from cachemedic.models.shape import ModelShape

GROUP = 32  # values that share a scale and a zero point, where nothing else is said


@dataclass(frozen=True)
class Checksummed(Defense):
    """Finds the damaged tokens of each layer by checksum and puts a copy in their place."""

    shape: ModelShape

    @abstractmethod
    def copy_bits(self) -> float:
        """What is kept of each token beside the checksums, in bits."""

    @abstractmethod
    def copy(self, clean: CachedTokens) -> KeysValues:
        """What damaged tokens will be read as: the clean keys and values as the copy gives them back."""

    @property
    def bytes_per_token(self) -> float:
        return (CHECKSUM_BITS * self.shape.num_layers + self.copy_bits()) / 8

    def write(self, clean: CachedTokens) -> tuple[torch.Tensor, KeysValues]:
        return token_checksums(clean.k, clean.v), self.copy(clean)

    def read(self, damaged: CachedTokens, kept: tuple[torch.Tensor, KeysValues]) -> CachedTokens:
        checksums, copy = kept
        hit = token_checksums(damaged.k, damaged.v) != checksums
        return self.repair(hit, replace(damaged, k=plausible(damaged.k), v=plausible(damaged.v)), copy)

    def repair(self, hit: torch.Tensor, tokens: CachedTokens, copy: KeysValues) -> CachedTokens:
        """What attention reads where tokens are damaged; hit, bool [B, L, T]."""
        at = hit[:, :, None, :, None]
        return replace(tokens, k=torch.where(at, copy[0], tokens.k), v=torch.where(at, copy[1], tokens.v))


@dataclass(frozen=True)
class GroupQuantisedShadow(Checksummed):
    """A copy in 1 to 8 bits a value: keys in groups of positions per channel, values of channels per position.

    The layout of KIVI (Liu et al. 2024). The scale and zero point of a group take 16 bits each and are counted; groups
    of positions count as full. The two levels of 1 bit are the mean of a group plus and minus its mean deviation.
    """

    bits: int = 2
    group: int = GROUP

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits {self.bits} is out of range: 1 to 8")
        if self.group < 1:
            raise ValueError(f"group {self.group} is out of range: 1 or more values")

    def copy_bits(self) -> float:
        heads, dim = self.shape.num_kv_heads, self.shape.head_dim
        return self.shape.num_layers * cache_bits(heads, dim, self.bits, self.group)

    def copy(self, clean: CachedTokens) -> KeysValues:
        span = _mean_deviation if self.bits == 1 else extremes
        return quantise_cache(clean.k, clean.v, clean.valid, self.bits, self.group, (span, span))


def _mean_deviation(groups: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean minus and plus the mean deviation of the present entries of groups [..., g]: [..., 1] each."""
    count = present.sum(-1, keepdim=True).clamp_min(1)
    mean = (groups * present).sum(-1, keepdim=True) / count
    deviation = ((groups - mean).abs() * present).sum(-1, keepdim=True) / count
    return mean - deviation, mean + deviation


@dataclass(frozen=True, eq=False)
class LowRankShadow(Checksummed):
    """Coordinates on the principal directions of clean caches, in bf16; keys and values apart, all heads of a layer.

    mean_k, mean_v [2, L, G * d]: of all positions but the first, and of the first, where attention has its sink;
    basis_k, basis_v [L, G * d, r]. Both belong to the model and cost nothing per token.
    """

    mean_k: torch.Tensor
    mean_v: torch.Tensor
    basis_k: torch.Tensor
    basis_v: torch.Tensor

    @classmethod
    def fit(cls, clean: CachedTokens, shape: ModelShape, share: float) -> LowRankShadow:
        """As many directions as fit, with the checksums, into `share` of the bytes of a bf16 cache.

        `clean` holds the caches of a calibration split. Raises `ValueError` if no direction fits.
        """
        rank = directions(shape, share)
        if rank < 1:
            raise ValueError(f"a share of {share} of the cache does not pay for one direction and the checksums")
        (mean_k, basis_k), (mean_v, basis_v) = (_principal(x, clean.valid, rank) for x in (clean.k, clean.v))
        return cls(shape, mean_k, mean_v, basis_k, basis_v)

    def copy_bits(self) -> float:
        return WORD_BITS * 2 * self.shape.num_layers * self.basis_k.shape[-1]

    @property
    def fixed_bytes(self) -> int:
        return sum(x.nbytes for x in (self.mean_k, self.mean_v, self.basis_k, self.basis_v))

    def copy(self, clean: CachedTokens) -> KeysValues:
        return (
            self._project(clean.k, clean.valid, self.mean_k, self.basis_k),
            self._project(clean.v, clean.valid, self.mean_v, self.basis_v),
        )

    def _project(self, x: torch.Tensor, valid: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        tokens = x.movedim(2, 3)  # [B, L, T, G, d]
        centre = mean.to(x)[is_first(valid).long()].movedim(2, 1)  # [B, L, T, G * d]
        basis = basis.to(x)
        stored = ((tokens.flatten(3) - centre) @ basis).bfloat16()
        return (stored.to(x) @ basis.mT + centre).view(tokens.shape).movedim(3, 2)


def directions(shape: ModelShape, share: float) -> int:
    """How many bf16 coordinates of each layer's keys, and of its values, fit with the checksums into `share`."""
    budget = share * 8 * cache_bytes_per_token(shape) / shape.num_layers - CHECKSUM_BITS
    return max(0, min(int(budget // (2 * WORD_BITS)), shape.num_kv_heads * shape.head_dim))


def _principal(x: torch.Tensor, valid: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [2, L, C] and the principal directions [L, C, rank] of x [N, L, G, T, d], C = G * d."""
    tokens = x.movedim(3, 1).flatten(3)  # [N, T, L, C]
    first = is_first(valid)
    means = torch.stack([tokens[at].mean(0) for at in (valid & ~first, first)])
    centred = (tokens - means[first.long()])[valid].movedim(0, 1).double()  # [L, S, C]
    _, directions = torch.linalg.eigh(centred.mT @ centred)  # by increasing variance
    return means, directions[..., -rank:].to(x)
