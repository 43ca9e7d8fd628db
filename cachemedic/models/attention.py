"""Which modules of a model are the self-attention of its decoder layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cachemedic.models.load import decoder_layers


def attention_modules(model: PreTrainedModel, layers: Iterable[int]) -> list[Any]:
    """The self-attention module of each of these decoder layers, in this order.

    Other parts of a composite model (an image encoder, a second decoder) and attention to an encoder do not count.
    Raises `ValueError` for a layer that has none, such as a state-space layer of a hybrid model.
    """
    parent, name = decoder_layers(model)
    modules, without = [], []
    for number in layers:
        inside = getattr(parent, name)[number].named_modules()
        found = [module for place, module in inside if _attends_to_itself(place, module)]
        if len(found) == 1 and found[0].layer_idx == number:  # it says to the cache, and to repair, which layer it is
            modules += found
        else:
            without.append(number)
    if without:
        kinds = sorted({type(getattr(parent, name)[number]).__name__ for number in without})
        raise ValueError(
            f"layers {without} of {type(model).__name__} ({', '.join(kinds)}) have no self-attention over a cache that "
            "repair could enter: leave them out"
        )
    return modules


def _attends_to_itself(place: str, module: nn.Module) -> bool:
    """Whether `module`, of this name in its layer, calls the attention interface, and for its own past."""
    forward = inspect.unwrap(type(module).forward)
    calls = "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())
    across = getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__ or "encoder" in place
    return calls and not across and getattr(module, "layer_idx", None) is not None
