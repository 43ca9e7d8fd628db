"""What the token ids alone tell exactly of a cache: the keys and values of its lowest layer."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cachemedic.token.vectors import TokenVectors


class _Written(Exception):
    """Ends the forward pass once the lowest layer has been written."""


class _LowestLayer(DynamicCache):
    """Ends the forward pass that fills it after one layer's projections."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        super().update(key_states, value_states, layer_idx, *args, **kwargs)
        raise _Written


@torch.inference_mode()
def stored_in_lowest_layer(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, T, d] that a cache of tokens ids [B, T] at positions [B, T] holds in its lowest layer.

    A model that takes no position_ids counts from 0: it has to be given all tokens from the first on.
    """
    cache = _LowestLayer()
    with suppress(_Written):
        model.base_model(
            input_ids=ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),  # without one, a first token that also pads warns
            position_ids=positions.to(model.device).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        )
    stored: Any = cache.layers[0]
    return stored.keys, stored.values


def lowest_layer(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Vectors [B, T, W] of the same tokens in the lowest layer; W = 2 G d."""
    keys, values = stored_in_lowest_layer(model, ids, positions)
    return TokenVectors(model, [0]).of([keys], [values], positions.to(model.device))
