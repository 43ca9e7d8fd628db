"""The very first token of a text, which the joint model leaves out: an attention sink, often the same in every text."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.token.joint import JointModel, Prior
from cachemedic.token.lowest_layer import lowest_layer

ALIKE = 0.5  # regression on the known first token from which on, without ids, the first token counts as that one
OFF = 0.01  # of its power, by which the lowest layer of the known first token may differ from what an id tells
OFF_WEIGHTS = 0.04  # the same for another number format, or weights that were tuned a little
SEARCHED = 4096  # ids at once

_of_weights: weakref.WeakKeyDictionary[JointModel, weakref.WeakSet[PreTrainedModel]] = weakref.WeakKeyDictionary()


def check_weights(model: PreTrainedModel, joint: JointModel) -> None:
    """Raises `ValueError` if the model has other weights than the one whose tokens the joint model describes.

    The known first token is one of the vocabulary: some id has its lowest layer, unless the weights are others. Tuning
    that hardly moves that layer is not seen, nor anything where texts began with different tokens.
    """
    fitting = _of_weights.setdefault(joint, weakref.WeakSet())
    if joint.first is None or not joint.lowest_is_exact or model in fitting:
        return
    width = 2 * joint.of.num_kv_heads * joint.of.head_dim
    known = joint.first[:width].float().to(model.device)
    for ids in _likely_first(model):
        lowest = lowest_layer(model, ids[:, None], torch.zeros_like(ids)[:, None])[:, 0].float()
        if ((lowest - known).square().sum(-1) < OFF_WEIGHTS * known.square().sum()).any():
            fitting.add(model)
            return
    raise ValueError(
        f"this operator was calibrated on other weights than those of this {type(model).__name__}: no token of its "
        "vocabulary has the first keys and values that calibration saw. Give the model of the operator, or `calibrate` "
        "an operator on this one"
    )


def _likely_first(model: PreTrainedModel) -> Iterator[Tensor]:
    """All ids of the vocabulary, those that mark the beginning or the end of a text before all others."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
    marks = [mark for mark in named if isinstance(mark, int) and 0 <= mark < config.vocab_size]
    if marks:
        yield torch.tensor(marks, device=model.device)
    yield from torch.arange(config.vocab_size, device=model.device).split(SEARCHED)


def with_first(joint: JointModel, found: Tensor, read: Tensor, prior: Prior | None, positions: Tensor) -> Tensor:
    """Estimates `found` [B, T, D], changed in place: at position 0 what calibration knows, if it is that token.

    Any other token there is as it was `read` [B, T, D]; prior: what the ids tell; positions [B, T]. Vectors are as they
    are stored: at position 0 keys have no rotation.
    """
    rows, slots = (positions == 0).nonzero(as_tuple=True)
    as_read = read[rows, slots].float().nan_to_num()
    found[rows, slots] = as_read.to(found.dtype)
    if joint.first is None:
        return found
    first = joint.first.float()
    if prior is not None and joint.lowest_is_exact:
        lowest = first[: prior.lowest.shape[-1]]
        off, size = prior.lowest[rows, slots].float() - lowest, lowest.square().sum()
        same = off.square().sum(-1) < OFF * size
    else:
        same = as_read @ first > ALIKE * first.square().sum()
    found[rows[same], slots[same]] = first.to(found.dtype)
    return found
