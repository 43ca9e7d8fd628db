"""One vector per cached token and layer: all key and value heads together, keys as they were before the rotation.

All heads of a layer are linear in one residual stream, and position enters a rotated key by a known orthogonal map
(RoPE, Su et al. 2021): joint vectors of unrotated keys take far fewer numbers to describe than heads do one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.token.vectors import KeyRotation as WholeTokenRotation


def join(key: Tensor, value: Tensor) -> Tensor:
    """Token vectors [B, L, T, D], D = 2 G d, of keys and values [B, L, G, T, d]: key heads first."""
    return torch.cat([x.transpose(2, 3) for x in (key, value)], 3).flatten(3)


def split(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The inverse of `join`: keys and values [B, L, G, T, d] of token vectors [B, L, T, D]."""
    key, value = (part.unflatten(-1, (heads, -1)).transpose(2, 3) for part in x.chunk(2, dim=-1))
    return key, value


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of keys at given positions: cos, sin [B, T, rotated width], or None for a model without one."""

    angles: tuple[Tensor, Tensor] | None
    heads: int

    def redo(self, x: Tensor) -> Tensor:
        """Token vectors [B, T, D] or [B, L, T, D] with their keys rotated, as they are stored."""
        return self._turn(x, 1.0)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `redo`."""
        return self._turn(x, -1.0)

    def _turn(self, x: Tensor, direction: float) -> Tensor:
        if self.angles is None:
            return x
        key, value = x.chunk(2, dim=-1)
        key = key.unflatten(-1, (self.heads, -1))
        cos, sin = (a[:, :, None].to(x) for a in self.angles)  # [B, T, 1, rotated width]
        if x.dim() == 4:
            cos, sin = cos[:, None], sin[:, None]
        rotated, rest = key[..., : cos.shape[-1]], key[..., cos.shape[-1] :]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([rotated * cos + direction * torch.cat([-second, first], -1) * sin, rest], -1)
        return torch.cat([turned.flatten(-2), value], -1)


class KeyRotation(WholeTokenRotation):
    """The rotary position embedding of a model, for vectors of one layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config = model.config.get_text_config()
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    def at(self, positions: Tensor) -> Rotation:
        """The rotation at positions [B, T] (padding: any number)."""
        return Rotation(self.angles(positions, torch.float32, whole=True), self.heads)
