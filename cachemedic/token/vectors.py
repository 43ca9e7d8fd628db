"""One vector a cached token: the keys and values of all protected layers and heads, keys as before their rotation.

Position enters a rotated key by a known orthogonal map (RoPE, Su et al. 2021), and what is left is linear in the
residual stream of the token: unrotated and taken together, all layers are described by far fewer numbers than they
hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.models.shape import ModelShape
from cachemedic.token.dense import LENGTH_DEPENDENT
from cachemedic.token.scratch import Scratch

Angles = tuple[Tensor, Tensor]


class KeyRotation:
    """The rotary position embedding of a model, if it has one.

    Raises `ValueError` for a model whose layers rotate differently, in other pairs than (i, i + width / 2), or by
    angles that depend on how long the text is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1].startswith("rotary_emb")]
        moving = sorted({kind for module in found for kind in _rope_types(module)} & set(LENGTH_DEPENDENT))
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
        self.layer_type = layer_types[:1] if by_type else []  # what an embedding for several kinds of layers asks for
        unlike = (
            f"{type(model).__name__} does not rotate number i of a key with number i + width / 2; token-aware "
            "repair serves models with that rotary embedding, or none"
        )
        try:
            angles = self.angles(torch.ones(1, 1, dtype=torch.long, device=model.device), torch.float32, whole=True)
        except (TypeError, ValueError) as error:  # its embedding does not give cosines and sines
            raise ValueError(unlike) from error
        if angles is not None and not all(torch.equal(*a.chunk(2, dim=-1)) for a in angles):
            raise ValueError(unlike)

    def angles(self, positions: Tensor, dtype: torch.dtype, whole: bool = False) -> Angles | None:
        """cos, sin [B, T, pairs] at positions [B, T] (padding: any number); None for a model without rotation.

        `whole`: [B, T, 2 pairs], as the model has them.
        """
        if self.embedding is None:
            return None
        like = torch.zeros(1, dtype=torch.float32, device=positions.device)
        with torch.no_grad():
            cos, sin = self.embedding(like, positions.clamp_min(0), *self.layer_type)
        name = "_".join([*self.layer_type, "attention_scaling"])
        scaling = getattr(self.embedding, name, 1.0)  # of long contexts: it is left in the keys
        pairs = cos.shape[-1] if whole else cos.shape[-1] // 2
        return (cos[..., :pairs] / scaling).to(dtype), (sin[..., :pairs] / scaling).to(dtype)


def _rope_types(embedding: Any) -> list[str]:
    """The rope types of an embedding, one a kind of layers."""
    found = getattr(embedding, "rope_type", "")
    return [str(kind) for kind in (found.values() if isinstance(found, dict) else [found])]


def turn_(keys: Tensor, angles: Angles | None, direction: int, scratch: Scratch | None = None) -> Tensor:
    """Keys [B, T, ..., d], rotated (direction 1) or unrotated (-1) in place: quicker where they lie close together."""
    if angles is None:
        return keys
    between = [1] * (keys.dim() - 3)
    cos, sin = (a.view(*a.shape[:2], *between, a.shape[-1]) for a in angles)
    pairs = cos.shape[-1]
    first, second = keys[..., :pairs], keys[..., pairs : 2 * pairs]
    turned = torch.mul(first, cos, out=None if scratch is None else scratch("turned", first, keys.dtype))
    turned.addcmul_(second, sin, value=-direction)
    second.mul_(cos).addcmul_(first, sin, value=direction)
    first.copy_(turned)
    return keys


class TokenVectors:
    """Between caches of a model and vectors of their tokens, for some layers (None: all).

    A vector [D] is [L, 2, G, d] in this order: layers, keys before values, heads. Raises `ValueError` for models that
    `ModelShape` or `KeyRotation` refuse, and for a layer that the model does not have.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] | None = None) -> None:
        shape = ModelShape.of(model.config)
        self.layers = tuple(range(shape.num_layers)) if layers is None else tuple(layers)
        for layer in self.layers:
            if not 0 <= layer < shape.num_layers:
                raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {shape.num_layers - 1}")
        self.rotation = KeyRotation(model)
        self.heads, self.head_dim = shape.num_kv_heads, shape.head_dim

    @property
    def dim(self) -> int:
        """D, the numbers of a vector."""
        return len(self.layers) * 2 * self.heads * self.head_dim

    def of(self, keys: Tensor | Sequence[Tensor], values: Tensor | Sequence[Tensor], positions: Tensor) -> Tensor:
        """Vectors [B, T, D] of stored keys and values: [B, L, G, T, d], or the protected layers [B, G, T, d] of them.

        positions [B, T]: what the tokens were written with (padding: any number).
        """
        sides = [x.unbind(1) if isinstance(x, Tensor) else x for x in (keys, values)]
        self._check(sides)
        batch, _, length, _ = sides[0][0].shape
        x = sides[0][0].new_empty(batch, length, len(self.layers), 2, self.heads, self.head_dim)
        angles = self.rotation.angles(positions.to(x.device), x.dtype)
        for place, (key, value) in enumerate(zip(*sides, strict=True)):
            x[:, :, place, 0] = turn_(key.clone().transpose(1, 2), angles, -1)
            x[:, :, place, 1] = value.transpose(1, 2)
        return x.flatten(2)

    def by_layer(self, x: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [B, T, G, d] as stored of vectors x [B, T, D], one layer after the other."""
        by_head = x.unflatten(-1, (len(self.layers), 2, self.heads, self.head_dim))
        angles = self.rotation.angles(positions.to(x.device), x.dtype)
        for place in range(len(self.layers)):
            keys = by_head[:, :, place, 0].transpose(1, 2).contiguous().transpose(1, 2)
            yield turn_(keys, angles, 1), by_head[:, :, place, 1]

    def back(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `of`: keys and values [B, L, G, T, d] of vectors [B, T, D]."""
        keys, values = (x.new_empty(len(x), len(self.layers), self.heads, x.shape[1], self.head_dim) for _ in range(2))
        angles = self.rotation.angles(positions.to(x.device), x.dtype)
        by_head = x.unflatten(-1, (len(self.layers), 2, self.heads, self.head_dim))
        for place in range(len(self.layers)):
            keys[:, place], values[:, place] = by_head[:, :, place].permute(2, 0, 3, 1, 4)
            turn_(keys[:, place].transpose(1, 2), angles, 1)
        return keys, values

    def _check(self, sides: list[Sequence[Tensor]]) -> None:
        for name, layers in zip(("keys", "values"), sides, strict=True):
            found = {tuple(x.shape[1:2] + x.shape[3:]) for x in layers}
            if len(layers) != len(self.layers) or found != {(self.heads, self.head_dim)}:
                raise ValueError(
                    f"{name} must be {len(self.layers)} layers of {self.heads} heads of {self.head_dim} numbers; got "
                    f"{len(layers)} layers of heads and widths {sorted(found)}"
                )
