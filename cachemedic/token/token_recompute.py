"""Recomputation of damaged tokens from their ids as a defense, to be measured beside all others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.defenses.registry import Calibration, register_defense
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.token.hashes import HASH_BYTES
from cachemedic.token.kept import hashes_of
from cachemedic.token.recompute import recompute_tokens


@dataclass(frozen=True, eq=False)
class TokenRecompute(Defense):
    """A hash of each token is kept; tokens whose hash changed are computed again by the model, exactly."""

    model: PreTrainedModel

    @property
    def bytes_per_token(self) -> float:
        return HASH_BYTES

    @property
    def prefill_share(self) -> float:
        return 1.0

    def write(self, clean: CachedTokens) -> torch.Tensor:
        """The hashes [B, T]."""
        return _hashes(clean)

    @torch.no_grad()
    def read(self, damaged: CachedTokens, kept: torch.Tensor) -> CachedTokens:
        """The cache with every changed token computed again; padding stays as it is."""
        changed = (_hashes(damaged) != kept) & damaged.valid
        cache = unstack_cache(damaged.k, damaged.v)
        positions = damaged.positions.clamp_min(0)
        recompute_tokens(self.model, list(cache.layers), damaged.ids, changed, damaged.valid, positions)
        k, v = stack_cache(cache)
        return replace(damaged, k=k, v=v)


def _hashes(tokens: CachedTokens) -> torch.Tensor:
    return hashes_of(tokens.k, tokens.v, range(tokens.k.shape[1])).whole


@register_defense("recompute")
def _recompute(calibration: Calibration) -> Defense:
    return TokenRecompute(calibration.model)
