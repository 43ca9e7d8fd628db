"""Which models and caches have tokens that can be looked at, and computed again, one by one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from cachemedic.models.load import FORMATS
from cachemedic.models.shape import ModelShape
from cachemedic.models.usable import check_is_model, check_mode

IMPLEMENTATIONS = ("sdpa", "eager")  # attention that takes a mask of its own for each query
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")  # layers that keep every token they can see
STORED = (torch.float64, *FORMATS)  # number formats of keys and values
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types whose angles change with the longest position of a call


def dense_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a model whose layers all attend, in evaluation mode.

    Raises `ValueError` for any other (see also `ModelShape.of`), wrapped ones too, `TypeError` for what is no model.
    """
    check_is_model(model)
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not hasattr(config, "num_attention_heads"):
        kinds = {"no attention"}
    if getattr(config, "cross_attention_layers", None):
        kinds.add("attention to an image")
    if others := sorted(kinds - set(ATTENTION)):
        raise ValueError(
            f"{type(model).__name__} has layers with {' and '.join(others)}, which do not keep the keys and values of "
            "every token: choose a model whose layers all attend"
        )
    shape = ModelShape.of(model.config)
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no past_key_values: choose a model that decodes on a cache")
    check_mode(model)
    return shape


def check_cache_of(model: PreTrainedModel, cache: Cache) -> int:
    """The number of tokens in a cache of plain keys and values of this model.

    Raises `TypeError` for a cache that is not organised in layers, `ValueError` for a model that `dense_shape` refuses,
    a layer that does not hold the keys and values of every token, and an empty cache.
    """
    shape = dense_shape(model)
    if not isinstance(getattr(cache, "layers", None), list):
        raise TypeError(
            f"a cache must hold its keys and values in `layers`, as DynamicCache does; {type(cache).__name__} does not"
        )
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, StaticLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"layer {number} of this cache is a {type(layer).__name__}, which does not hold the keys and values "
                "of every token: allowed are layers of a DynamicCache or StaticCache of a model whose layers all attend"
            )
        for stored in (layer.keys, layer.values) if layer.is_initialized else ():
            if stored.dtype not in STORED:
                raise ValueError(
                    f"layer {number} of this cache holds {stored.dtype}: give keys and values as the model wrote them, "
                    f"not quantised; allowed: {', '.join(map(str, STORED))}"
                )
    if len(layers) != shape.num_layers or not all(layer.is_initialized for layer in layers):
        written = sum(layer.is_initialized for layer in layers)
        raise ValueError(f"{written} layers of this cache hold tokens; the model has {shape.num_layers} layers")
    lengths = {_held(layer) for layer in layers}
    if len(lengths) != 1:
        raise ValueError(f"all layers must hold the same tokens; these hold {sorted(lengths)} of them")
    return lengths.pop()


def _held(layer: Any) -> int:
    """How many tokens a layer has seen. Raises `ValueError` for a sliding window that has dropped some."""
    seen = int(layer.get_seq_length())
    if seen > layer.keys.shape[2]:
        raise ValueError(
            f"a sliding window of {layer.sliding_window} tokens has dropped the first of {seen} tokens: a cache can be "
            "looked after while its text is shorter than the window, or without sliding layers"
        )
    return seen


def check_can_recompute(model: PreTrainedModel, length: int) -> None:
    """Raises `ValueError` if tokens of a cache of `length` tokens cannot be computed again from their ids."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if (window := shortest_window(config)) is not None and length > window:
        raise ValueError(
            f"{name} has layers that attend to the last {window} tokens only, and the cache holds {length}: exact "
            f"recomputation serves caches of up to {window} tokens of this model"
        )
    implementation = config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention {implementation!r} takes no mask of its own for each token: call "
            f"model.set_attn_implementation with one of {', '.join(map(repr, IMPLEMENTATIONS))}"
        )
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise ValueError(f"{name} adds a bias by distance (ALiBi), which one pass over scattered tokens cannot make")
    if not takes_positions(model):
        raise ValueError(f"{name} takes no position_ids, without which scattered tokens cannot be given their places")
    rope = getattr(config, "rope_parameters", None) or {}
    trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope.get("rope_type") in LENGTH_DEPENDENT and length > trained:
        raise ValueError(
            f"the rotary embedding of {name} is {rope['rope_type']!r}: beyond {trained} tokens its angles depend on "
            f"how the text was cut into passes, and the cache holds {length}"
        )


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether a model can be told where its tokens stand; others count from the first that they are given."""
    return "position_ids" in inspect.signature(model.forward).parameters


def shortest_window(config: Any) -> int | None:
    """How many tokens, itself included, a token sees in the layers that see least; None if all see every token."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    windows = [
        getattr(config, size, None)
        for kind, size in (("sliding", "sliding_window"), ("chunked", "attention_chunk_size"))
        if kinds is None or any(kind in layer for layer in kinds)
    ]
    return min((window for window in windows if window is not None), default=None)
