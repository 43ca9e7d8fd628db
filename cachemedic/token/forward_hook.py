"""Tells a cache, before each forward pass, what it cannot see: the ids and the positions of the new tokens."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel


class HookedCache(Cache, ABC):
    """A cache that a forward pre-hook gives the ids and positions of the tokens that come."""

    @abstractmethod
    def begin(self, ids: Tensor, positions: Tensor) -> None:
        """Called before each forward pass over tokens ids [B, M] at positions [B, M], -1 for padding."""

    @abstractmethod
    def known_positions(self) -> Tensor:
        """Positions [B, T] of the tokens that are cached, -1 for padding."""

    @property
    @abstractmethod
    def preallocated(self) -> bool:
        """Whether layers hold places that nothing was written to yet."""

    @abstractmethod
    def unread(self) -> Tensor | None:
        """Cached tokens [B, T] that attention must not read although they are no padding; None if there are none."""


class ForwardHooks:
    """Keeps the hooks on a model for as long as a cache holds this object. One a model: `ForwardHooks.of`.

    A copy of the model that is made meanwhile (`copy.deepcopy`, `torch.save`) drops its hooks when it is first called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = {model, model.base_model}  # a head calls the base model; a caller may leave the head out
        for module in modules:
            _forget(module)
            _hooked.add(module)
        handles = [module.register_forward_pre_hook(_announce, with_kwargs=True) for module in modules]
        self.model = weakref.ref(model)
        weakref.finalize(self, _remove, handles, weakref.WeakSet(modules))

    @classmethod
    def of(cls, model: PreTrainedModel) -> ForwardHooks:
        """The one that the caches of a model share."""
        known = _hooks_of.get(model)
        hooks = None if known is None else known()
        if hooks is None:
            hooks = cls(model)
            _hooks_of[model] = weakref.ref(hooks)
        return hooks


_hooks_of: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ForwardHooks]] = weakref.WeakKeyDictionary()
_hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # what hooks were put on; a copy is not in it


def _remove(handles: list[Any], modules: weakref.WeakSet[nn.Module]) -> None:
    for handle in handles:
        handle.remove()
    for module in modules:
        _hooked.discard(module)


def _forget(module: nn.Module) -> None:
    """Drops the hooks that a copy has from its original."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if hook is _announce:
            del module._forward_pre_hooks[number], module._forward_pre_hooks_with_kwargs[number]


def _announce(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The forward pre-hook. Raises `ValueError` for a call that does not tell a `HookedCache` ids or positions."""
    if not torch.compiler.is_compiling() and module not in _hooked:
        _forget(module)
        return None
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    cache = given.get("past_key_values")
    if not isinstance(cache, HookedCache):
        return None
    if (ids := given.get("input_ids")) is None:
        raise ValueError(f"a {type(cache).__name__} keeps token ids: pass input_ids in place of inputs_embeds")
    if ids.dim() != 2:
        raise ValueError(f"a {type(cache).__name__} takes input_ids [B, M], not {list(ids.shape)}")
    past = int(cache.get_seq_length())
    if given.get("position_ids") is None and _numbers_by_padding(module):
        raise ValueError(f"{type(module).__name__} numbers tokens from its padding index on: pass position_ids")
    positions = _positions(cache, given, past, ids)
    cache.begin(ids, positions)
    unread, mask = cache.unread(), given.get("attention_mask")
    if unread is None and not (mask is None and cache.preallocated):  # then a single query would read empty places
        return None
    mask = torch.ones(len(ids), past + ids.shape[1]).long().to(ids.device) if mask is None else mask.clone()
    if unread is not None:
        mask[:, :past] = mask[:, :past].masked_fill(unread, 0)
    return (), given | {"attention_mask": mask, "position_ids": positions.clamp_min(0)}


def _numbers_by_padding(module: nn.Module) -> bool:
    """Whether a model without position_ids does not begin at 0: RoBERTa and what was built after it."""
    return any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules())


def _positions(cache: HookedCache, given: dict[str, Any], past: int, ids: Tensor) -> Tensor:
    """Positions [B, M] of the new tokens behind `past` ones, -1 for padding."""
    end = past + ids.shape[1]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    valid = torch.ones_like(ids, dtype=torch.bool)
    name = type(cache).__name__
    if mask is not None:
        shape = getattr(mask, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != len(ids) or shape[1] < end:
            found = f"a mask {list(shape)}" if shape is not None else f"a {type(mask).__name__}"
            raise ValueError(f"a {name} tells padding by an attention mask [{len(ids)}, {end}], not {found}")
        valid = mask[:, past:end].bool()
    if positions is None:
        padded = past > 0 and bool((cache.known_positions() < 0).any())
        if padded or not valid.all():
            raise ValueError("with padding, models number tokens in different ways: pass position_ids")
        positions = torch.arange(past, end, device=ids.device)[None]
    if positions.dim() != 2 or len(positions) not in (1, len(ids)) or positions.shape[1] != ids.shape[1]:
        raise ValueError(f"a {name} takes position_ids {list(ids.shape)}, not {list(positions.shape)}")
    return torch.where(valid, positions.expand(len(ids), -1), -1)
