"""Exact recomputation of some tokens of a cache from their ids.

One forward pass runs over the damaged tokens alone. Each of them attends to every token before it, of which the sound
ones are read from the cache and the damaged ones have been written anew by the same pass, layer by layer. The result is
what a prefill of the whole text would store, up to the rounding of the kernels, and it takes about the damaged tokens'
share of a prefill.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cachemedic.core.errors import check_given
from cachemedic.token.block_attention import BlockMask
from cachemedic.token.dense import check_cache_of, check_can_recompute
from cachemedic.token.given import check_ids, tokens_given

BLOCK = 512  # keys that attention kernels sum up at once at most: whole blocks are read, for sums in the same order
PIECE = 256  # tokens a row that are computed at once, in order: those before do not attend to what comes after


@torch.inference_mode()
def recompute(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,
    damaged: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> None:
    """Computes the damaged tokens of a cache again, in place.

    It is exact while every token that is not `damaged` is sound. Tokens of padding are never read by attention; damaged
    ones are set to zero, so that no number of theirs is left that is not finite.

    Args:
        model: the dense decoder whose cache it is, in evaluation mode.
        cache: holds T tokens of B rows in the layers of a `DynamicCache` or `StaticCache`.
        ids: [B, T], the ids of all cached tokens.
        damaged: bool [B, T], any pattern.
        attention_mask: [B, T], 0 for padding; None if there is none.
        position_ids: [B, T], what the tokens were written with; None: counted from the first token that is no padding.

    Raises:
        TypeError: for a cache without layers of keys and values, and for `damaged` that is not boolean.
        ValueError: for tensors of other shapes, for ids from which the tokens that are not damaged do not follow, and
            for a model or cache whose tokens cannot be computed again one by
            one: encoder-decoders, latent attention, hybrids, text longer than a sliding window, dropout in use.
    """
    check_given("damaged", damaged, Tensor)
    length = check_cache_of(model, cache)
    check_can_recompute(model, length)
    layers: list[Any] = cache.layers
    ids, valid, positions = tokens_given(model, cache, ids, attention_mask, position_ids)
    if damaged.dtype != torch.bool:
        raise TypeError(f"damaged must be a boolean tensor, not {damaged.dtype}")
    if damaged.shape != ids.shape:
        raise ValueError(f"damaged must be {list(ids.shape)}, as the cache has it, not {list(damaged.shape)}")
    damaged = damaged.to(model.device)
    check_ids(model, layers[0], ids, positions, valid & ~damaged)
    recompute_tokens(model, layers, ids, damaged, valid, positions)


def recompute_tokens(
    model: PreTrainedModel, layers: list[Any], ids: Tensor, damaged: Tensor, valid: Tensor, positions: Tensor
) -> None:
    """What `recompute` does, of arguments [B, T] that are known to be right; `valid`: tokens that attention reads."""
    length, device = ids.shape[1], model.device
    clear(layers, damaged & ~valid)
    damaged = damaged & valid
    if not damaged.any():
        return
    rows = damaged.any(1).nonzero().squeeze(1)
    count = int(damaged.sum(1).max())
    if count == length:
        slots = torch.arange(length, device=device).expand(len(rows), -1)
        _pass_over(model, layers, ids, positions, valid, rows, slots, damaged[rows])
        return
    # the damaged slots of each row first and in order; rows with fewer of them repeat others, which are not written
    if count > PIECE:
        clear(layers, damaged)  # a kernel multiplies what lies ahead by zero: it has to be finite
    slots = damaged[rows].logical_not().byte().argsort(dim=1, stable=True)[:, :count]
    for piece in slots.split(PIECE, dim=1):
        _pass_over(model, layers, ids, positions, valid, rows, piece, damaged[rows].gather(1, piece))


def _pass_over(
    model: PreTrainedModel,
    layers: list[Any],
    ids: Tensor,
    positions: Tensor,
    valid: Tensor,
    rows: Tensor,
    slots: Tensor,
    real: Tensor,
) -> None:
    """Computes the tokens at `slots` [R, n] of `rows` [R] and writes those that are `real` [R, n]."""
    length = valid.shape[1]
    if slots.shape[1] == length:  # a prefill: the model makes its own mask, for which it has faster kernels
        width, mask = length, valid[rows].long()
    else:
        width = min(-(-(int(slots.max()) + 1) // BLOCK) * BLOCK, length)  # nothing behind the last slot is read
        mask = BlockMask.of(_mask(slots, valid[rows, :width], model.dtype), slots, BLOCK)
    with suppress(_Complete):
        model.base_model(
            input_ids=ids[rows].gather(1, slots),
            position_ids=positions[rows].gather(1, slots),
            attention_mask=mask,
            past_key_values=Patch(layers, rows, slots, real, width),
            use_cache=True,
        )


def clear(layers: list[Any], tokens: Tensor) -> None:
    """Sets `tokens`, bool [B, T], to zero."""
    rows, slots = tokens.nonzero(as_tuple=True)
    if len(rows):
        for layer in layers:
            for stored in (layer.keys, layer.values):
                stored[rows.to(stored.device), :, slots.to(stored.device)] = 0


def _mask(slots: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the logits [R, 1, n, W] of queries at `slots` [R, n], which read `valid` [R, W] to their own."""
    index = torch.arange(valid.shape[1], device=slots.device)
    read = (index <= slots[..., None]) & valid[:, None]
    return torch.zeros(read.shape, dtype=dtype, device=slots.device).masked_fill(~read, torch.finfo(dtype).min)[:, None]


class _Complete(Exception):
    """Ends the forward pass once the last layer has been written: what follows it is not needed."""


class Patch(Cache):
    """The first `width` tokens of `rows` [R] of a cache's layers: an update writes at `slots` [R, n], where `real`."""

    def __init__(self, layers: list[Any], rows: Tensor, slots: Tensor, real: Tensor, width: int) -> None:
        super().__init__(layers=[])  # which it reports to a model: nothing is cached behind the new tokens
        self.stored, self.rows, self.width = layers, rows, width
        self.every_row = len(rows) == len(layers[0].keys)
        self.row, self.place = real.nonzero(as_tuple=True)
        self.at = rows[self.row], slots[self.row, self.place]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the new tokens [R, G, n, d]; returns keys and values [R, G, width, d]."""
        layer = self.stored[layer_idx]
        read = [self._write(x, new) for x, new in ((layer.keys, key_states), (layer.values, value_states))]
        if layer_idx == len(self.stored) - 1:
            raise _Complete
        return read[0], read[1]

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        rows, slots = (index.to(stored.device) for index in self.at)  # of an offloaded layer
        stored[rows, :, slots] = new.transpose(1, 2)[self.row, self.place].to(stored)
        read = stored[:, :, : self.width]
        return (read if self.every_row else read[self.rows.to(stored.device)]).to(new.device)
