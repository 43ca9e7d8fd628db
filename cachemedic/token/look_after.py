"""A cache that exists already, from another process or machine, taken into a SketchCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cachemedic.token.cache import SketchCache
from cachemedic.token.dense import check_cache_of
from cachemedic.token.given import check_ids, tokens_given
from cachemedic.token.joint_operator import JointOperator


@torch.inference_mode()
def look_after(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,
    operator: JointOperator | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seed: int = 0,
) -> SketchCache:
    """A `SketchCache` of a filled cache, whose tensors it shares: what is stored now counts as what was written.

    Args:
        model: the dense decoder whose cache it is.
        cache: T tokens of B rows in the layers of a `DynamicCache` or `StaticCache`.
        ids: [B, T], of all cached tokens.
        operator, seed: see `SketchCache`.
        attention_mask: [B, T], 0 for padding; None if there is none.
        position_ids: [B, T], what the tokens were written with; None: counted from the first token that is no padding.

    Raises:
        TypeError: for a cache without layers of keys and values.
        ValueError: for what `SketchCache` refuses, an empty cache, tensors of other shapes, and ids or positions that
            are not those of the cache: its lowest layer follows from them. Damage that is there already cannot be
            told from what was written: `check_cache` finds it, and `recompute` mends it before.
    """
    result = SketchCache(model, operator, seed=seed)
    check_cache_of(model, cache)
    ids, valid, positions = tokens_given(model, cache, ids, attention_mask, position_ids)
    layers: list[Any] = cache.layers
    check_ids(model, layers[0], ids, positions, valid)
    result.adopt(cache, ids, torch.where(valid, positions, -1))
    return result
