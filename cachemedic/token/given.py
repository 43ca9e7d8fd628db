"""Token ids that are said to be those of a cache: their shape, and whether the cache follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cachemedic.token.lowest_layer import stored_in_lowest_layer

UNLIKE = 0.2  # of the size of a token's numbers in the lowest layer: rounding stays far below, another id is far above


def tokens_given(
    model: PreTrainedModel, cache: Cache, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, which of them are no padding, and their positions, all [B, T] on the model's device, of T cached tokens.

    attention_mask: 0 for padding, None if there is none; position_ids: None: counted from the first token that is no
    padding. Raises `TypeError` for what is no tensor, `ValueError` for tensors of another shape and for ids that the
    model does not have.
    """
    layers: list[Any] = cache.layers
    shape = [len(layers[0].keys), int(cache.get_seq_length())]
    given = {"ids": ids, "attention_mask": attention_mask, "position_ids": position_ids}
    for name, tensor in given.items():
        if (tensor is not None or name == "ids") and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not a {type(tensor).__name__}")
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, as the cache has it, not {list(tensor.shape)}")
    embeddings: Any = model.get_input_embeddings()
    last = len(embeddings.weight) - 1
    if ids.dtype not in (torch.int64, torch.int32) or not ((ids >= 0) & (ids <= last)).all():
        raise ValueError(f"ids must be whole numbers (int64) from 0 to {last}, {type(model).__name__} has no others")
    ids = ids.to(model.device)
    valid = torch.ones_like(ids).bool() if attention_mask is None else attention_mask.to(model.device).bool()
    if not valid.any():
        raise ValueError("attention_mask calls every token padding: it must be 1 where a token was read")
    positions = (valid.cumsum(1) - 1).clamp_min(0) if position_ids is None else position_ids.to(model.device)
    return ids, valid, positions


def check_ids(model: PreTrainedModel, lowest: Any, ids: Tensor, positions: Tensor, sound: Tensor) -> None:
    """Raises `ValueError` if `sound` tokens [B, T] do not follow from their ids, or are of another number format.

    lowest: the lowest layer of the cache, which follows from ids and positions alone.
    """
    error = size = torch.zeros((), device=ids.device)
    for x, stored in zip(stored_in_lowest_layer(model, ids, positions), (lowest.keys, lowest.values), strict=True):
        if stored.dtype != x.dtype:
            raise ValueError(f"the cache holds {stored.dtype}, but {type(model).__name__} writes {x.dtype}")
        error = error + (stored[:, :, : ids.shape[1]].to(x) - x).float().square().sum((1, 3))
        size = size + x.float().square().sum((1, 3))
    wrong = ~(error < UNLIKE**2 * size) & sound
    if wrong.any():
        row, slot = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{int(wrong.sum())} tokens that are not damaged do not follow from their ids and positions, first of them "
            f"slot {slot} of row {row}: give the ids of this cache, and say of all its damage that it is"
        )
