"""One vector per cached token and layer: all key and value heads together, keys as they were before the rotation.

All heads of a layer are linear in one residual stream, and position enters a rotated key by a known orthogonal map
(RoPE, Su et al. 2021): joint vectors of unrotated keys take far fewer numbers to describe than heads do one by one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


def join(key: Tensor, value: Tensor) -> Tensor:
    """Token vectors [B, L, T, D], D = 2 G d, of keys and values [B, L, G, T, d]: key heads first."""
    return torch.cat([x.transpose(2, 3) for x in (key, value)], 3).flatten(3)


def split(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The inverse of `join`: keys and values [B, L, G, T, d] of token vectors [B, L, T, D]."""
    key, value = (part.unflatten(-1, (heads, -1)).transpose(2, 3) for part in x.chunk(2, dim=-1))
    return key, value


LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types whose angles depend on the longest position of a call


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


class KeyRotation:
    """The rotary position embedding of a model, if it has one.

    Raises `ValueError` for a model whose layers rotate differently, in other pairs than (i, i + width / 2), or by
    angles that depend on how long the text is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1].startswith("rotary_emb")]
        moving = sorted({str(getattr(module, "rope_type", "")) for module in found} & set(LENGTH_DEPENDENT))
        if moving:
            raise ValueError(
                f"the rotary embedding of {type(model).__name__} is {moving[0]!r}: its angles depend on the length of "
                "the text, so that stored keys cannot be unrotated; token-aware repair serves any other type"
            )
        config = model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None) or []
        by_type = found and "layer_type" in inspect.signature(found[0].forward).parameters
        some_without = found and 0 in (getattr(config, "no_rope_layers", None) or [])
        if len(found) > 1 or some_without or (by_type and len(set(layer_types)) > 1):
            raise ValueError(
                f"{type(model).__name__} rotates the keys of its layers in different ways; token-aware repair serves "
                "models with one rotary embedding, or none"
            )
        self.embedding = found[0] if found else None
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        angles = self.at(torch.ones(1, 1, dtype=torch.long, device=model.device)).angles
        if angles is not None and not all(torch.equal(*a.chunk(2, dim=-1)) for a in angles):
            raise ValueError(
                f"{type(model).__name__} does not rotate number i of a key with number i + width / 2; token-aware "
                "repair serves models with that rotary embedding, or none"
            )

    def at(self, positions: Tensor) -> Rotation:
        """The rotation at positions [B, T] (padding: any number)."""
        if self.embedding is None:
            return Rotation(None, self.heads)
        like = torch.zeros(1, dtype=torch.float32, device=positions.device)
        with torch.no_grad():
            cos, sin = self.embedding(like, positions.clamp_min(0))
        scaling = getattr(self.embedding, "attention_scaling", 1.0)  # of long contexts: it is left in the keys
        return Rotation((cos / scaling, sin / scaling), self.heads)
