"""What repair inside attention is given, and what it has to offer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Gates = tuple[Tensor | None, Tensor | None]


class Attention(Protocol):
    """A model's own attention in one layer, its mask and scaling included; heads may be wider than the model's."""

    @property
    def scaling(self) -> float:
        """What logits are multiplied by, whatever the width of the heads."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """query [R*B, H, M, n], key and value [R*B, G, T, n] -> (output [R*B, M, H, n], weights or None)."""


class AttentionRepair(Protocol):
    """What `cachemedic.repair.attach.protect` attaches to a model: an operator, or what it has found in one cache."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The indices of the protected layers."""

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""

    def check_model(self, model_config: PreTrainedConfig) -> None:
        """Raise `ValueError` for a model of another shape."""

    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """Attention of one layer, see `cachemedic.repair.operator.RepairOperator.attend`."""
