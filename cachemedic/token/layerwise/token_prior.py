"""What the token ids alone say of a cache: the keys and values of the lowest layers, computed again."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cachemedic.models.cache import stack_cache


class _Enough(Exception):
    """Ends the forward pass once the layers that are asked for are there."""


class LowestLayers(DynamicCache):
    """Ends the forward pass that fills it after `count` layers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        updated = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.count - 1:
            raise _Enough
        return updated


@torch.inference_mode()
def lowest_layers(model: PreTrainedModel, ids: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, count, G, T, d] of the lowest layers for tokens ids [B, T] at positions [B, T] (padding: -1).

    It takes the first count - 1 layers of a prefill; one layer takes its projections only.
    """
    cache = LowestLayers(count)
    with suppress(_Enough):
        model.base_model(
            input_ids=ids,
            attention_mask=(positions >= 0).long(),
            position_ids=positions.clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        )
    return stack_cache(cache)
