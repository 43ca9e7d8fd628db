"""Which layers of a Hugging Face cache a `SketchCache` stores in."""

from __future__ import annotations

from typing import Any

from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from cachemedic.core.errors import check_given


def without_window(layer: Any) -> Any:
    """A layer that holds the same tensors and drops no token."""
    if type(layer) is not DynamicSlidingWindowLayer:
        return layer
    plain: Any = DynamicLayer()
    plain.lazy_initialization(layer.keys, layer.values)
    plain.keys, plain.values = layer.keys, layer.values
    return plain


def empty_storage(cache: Cache) -> Cache:
    """The cache, if a SketchCache can take over its storage."""
    check_given("storage", cache, Cache)
    if not isinstance(getattr(cache, "layers", None), list):
        raise TypeError(f"the storage must be a DynamicCache or StaticCache, not a {type(cache).__name__}")
    if cache.get_seq_length() > 0:
        raise ValueError(f"the storage holds {int(cache.get_seq_length())} tokens already: give an empty cache")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, StaticLayer):
            raise ValueError(
                "a SketchCache stores in layers of a DynamicCache or StaticCache without sliding windows, not in a "
                f"{type(layer).__name__}"
            )
    return cache
