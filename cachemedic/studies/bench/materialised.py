"""Repair the plain way: the repaired keys and values are formed, for every query anew, and attention reads those."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from cachemedic.repair.attention import Attention, Gates
from cachemedic.repair.folded import FoldedOperator


class MaterialisedOperator(FoldedOperator):
    """A folded family without the fold; mixed into a family by `materialised`.

    One query a row, and a model whose query heads have keys of their own (no grouped heads). `repaired` holds what was
    last read, by layer: keys and values [R*B, H, T, d].
    """

    repaired: dict[int, tuple[Tensor, Tensor]]

    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """See `RepairOperator.attend`; no gates are reported."""
        keys, values = (x[:, :, 0] for x in self.materialise(layer, query, key, value))
        self.repaired[layer] = keys, values
        output, weights = attention(query, keys, values)
        return output, weights, (None, None)


def materialised(operator: FoldedOperator) -> MaterialisedOperator:
    """A copy of `operator` that forms what it repairs."""
    family = type("Materialised" + type(operator).__name__, (MaterialisedOperator, type(operator)), {})
    copy = family(operator.config, {name: p.detach().clone() for name, p in operator.named_parameters()})
    copy.repaired = {}
    return copy


class PresetLayer(DynamicLayer):
    """A cache layer that begins with given keys and values [B, G, T, d], which are not copied."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


class RepeatableLayer(PresetLayer):
    """A cache layer that ends in a free slot, written anew by every step: one step can be timed again and again.

    Nothing is copied, as in a serving system whose cache has room; `DynamicCache` copies itself at every token.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the token [B, G, 1, d] into the slot; returns all keys and values."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions before the slot."""
        return self.keys.shape[2] - 1
