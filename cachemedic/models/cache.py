"""Between a Hugging Face cache and two stacked tensors."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache


def stack_cache(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored keys and values of all layers, each [B, L, G, T, d] (a copy).

    Raises `ValueError` if layers hold different shapes (sliding windows): corrupt or read such a cache layer by layer;
    `TypeError` for the cache of a model with an encoder.
    """
    if isinstance(cache, EncoderDecoderCache):
        raise TypeError("an EncoderDecoderCache holds two caches: give its self_attention_cache")
    layers: list[Any] = cache.layers  # their classes share no type that has keys and values
    shapes = {tuple(layer.keys.shape) for layer in layers}
    if len(shapes) != 1:
        raise ValueError(f"a cache can be stacked only if all layers hold one shape; this one holds {sorted(shapes)}")
    keys = torch.stack([layer.keys for layer in layers], dim=1)
    return keys, torch.stack([layer.values for layer in layers], dim=1)


def unstack_cache(keys: torch.Tensor, values: torch.Tensor) -> DynamicCache:
    """A cache that holds `keys` and `values` [B, L, G, T, d]; decoding on it leaves these tensors as they are."""
    cache = DynamicCache()
    for layer in range(keys.shape[1]):
        cache.update(keys[:, layer], values[:, layer], layer)
    return cache
