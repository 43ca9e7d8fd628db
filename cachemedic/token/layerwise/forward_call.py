"""Tells a `SketchCache` of each forward pass what it could not see: the ids and the positions of the new tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from cachemedic.repair.attach import Watch
from cachemedic.token.layerwise.token_prior import LowestLayers


def announce(operator: Any, watch: Watch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a model that `operator` protects while `watch` is active.

    Raises `ValueError` for a cache that is no `SketchCache` of this operator, which would not be repaired, and for a
    call that does not tell ids or positions.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    cache = given.get("past_key_values")
    if cache is None or isinstance(cache, LowestLayers):
        return
    if getattr(cache, "operator", None) is not operator:
        found = "one of another operator" if hasattr(cache, "operator") else f"a {type(cache).__name__}"
        raise ValueError(
            f"family {operator.family} repairs what a SketchCache stores, and the model got {found}: pass "
            "past_key_values=SketchCache(model, operator)"
        )
    ids = _ids(operator, given)
    past = int(cache.get_seq_length())
    cache.begin(ids, _positions(cache, given, past, ids), watch)


def _ids(operator: Any, given: dict[str, Any]) -> Tensor:
    """The ids [B, M] of the new tokens; zeros where only embeddings are given and nothing follows from the ids."""
    if (ids := given.get("input_ids")) is not None:
        return ids
    if operator.known_layers:
        raise ValueError(
            f"the lowest {operator.known_layers} layers are repaired from the token ids: pass input_ids in place of "
            "inputs_embeds, or use an operator with known_layers=0"
        )
    embeddings = given["inputs_embeds"]
    return torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)


def _positions(cache: Any, given: dict[str, Any], past: int, ids: Tensor) -> Tensor:
    """Positions [B, M] of the new tokens behind `past` ones, -1 for padding."""
    end = past + ids.shape[1]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    valid = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        shape = getattr(mask, "shape", None)
        if shape is None or len(shape) != 2 or shape[1] < end:
            found = f"a mask {list(shape)}" if shape is not None else f"a {type(mask).__name__}"
            raise ValueError(f"a SketchCache tells padding by an attention mask [{len(ids)}, {end}], not {found}")
        valid = mask[:, past:end].bool()
    if positions is None:
        padded = cache.record is not None and (cache.record.positions < 0).any()
        if padded or not valid.all():
            raise ValueError("with padding, models number tokens in different ways: pass position_ids")
        positions = torch.arange(past, end, device=ids.device)[None]
    if positions.dim() != 2:
        raise ValueError(f"a SketchCache takes position_ids [B, M], not {list(positions.shape)}")
    return torch.where(valid, positions.expand(len(ids), -1), -1)
