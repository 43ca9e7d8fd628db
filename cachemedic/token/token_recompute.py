"""Recomputation of damaged tokens as a defense, from their ids or from kept states, measured beside all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.quantise import SCALE_BITS, quantise_in_groups
from cachemedic.defenses.defense import WORD_BITS, CachedTokens, Defense
from cachemedic.defenses.registry import Calibration, register_defense
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.models.load import decoder_layers
from cachemedic.models.shape import ModelShape
from cachemedic.token.hashes import HASH_BYTES
from cachemedic.token.kept import hashes_of
from cachemedic.token.recompute import Patch, recompute_tokens

STATE_BITS, STATE_GROUP = (8, WORD_BITS), 32  # of a number of a kept state; numbers that share a scale and a zero point

States = dict[int, Tensor]  # what goes into a layer, [B, T, width], by layer


@dataclass(frozen=True, eq=False)
class TokenRecompute(Defense):
    """A hash of each token is kept; tokens whose hash changed are computed again by the model, exactly."""

    model: PreTrainedModel

    @property
    def bytes_per_token(self) -> float:
        return HASH_BYTES

    @property
    def prefill_share(self) -> float:
        return 1.0

    def write(self, clean: CachedTokens) -> Any:
        """The hashes [B, T]."""
        return _hashes(clean)

    @torch.no_grad()
    def read(self, damaged: CachedTokens, kept: Any) -> CachedTokens:
        """The cache with every changed token computed again; padding stays as it is."""
        here = damaged.to(self.model.device)
        changed = (_hashes(here) != kept.to(here.k.device)) & here.valid
        cache = unstack_cache(here.k, here.v)
        recompute_tokens(self.model, list(cache.layers), here.ids, changed, here.valid, here.positions.clamp_min(0))
        k, v = stack_cache(cache)
        return replace(here, k=k, v=v).to(damaged.k.device)


@dataclass(frozen=True, eq=False)
class HiddenStates(TokenRecompute):
    """What goes into some `layers` is kept of each token beside its hash, and changed tokens are computed from there.

    The idea of HCache (Gao et al. 2024, arXiv 2410.05004), which keeps the states of all layers: keys and values of a
    layer are a projection of its state. A layer runs if the state that comes out of it is needed and is not kept; the
    lowest layer starts from the ids, so that its state is never kept. States take 16 bits a number (bf16 for a wider
    model), which is exact up to their rounding, or 8 bits, with a scale and a zero point of 16 bits each for 32
    numbers.

    What is measured is what the read leaves. `prefill_share` is that of a runtime which leaves out the layers that need
    not run; here they run, and what comes out of them is replaced.

    Raises `ValueError` for no layer, one that the model does not have or that needs no state, and other bits.
    """

    layers: tuple[int, ...]
    bits: int = WORD_BITS

    def __post_init__(self) -> None:
        last = ModelShape.of(self.model.config).num_layers - 1
        wrong = [layer for layer in self.layers if not 1 <= layer <= last]
        if wrong or not self.layers:
            raise ValueError(f"layers {list(self.layers)} are out of range: one or more from 1 to {last}")
        if self.bits not in STATE_BITS:
            raise ValueError(f"bits {self.bits} is out of range: {STATE_BITS[0]} or {STATE_BITS[1]}")

    @property
    def bytes_per_token(self) -> float:
        width = self.model.config.get_text_config().hidden_size
        scales = 2 * SCALE_BITS * -(-width // STATE_GROUP) if self.bits < WORD_BITS else 0
        return HASH_BYTES + len(set(self.layers)) * (self.bits * width + scales) / 8

    @property
    def prefill_share(self) -> float:
        """By the weights that are multiplied with: those of whole layers, and of projections to keys and values."""
        shape, config = ModelShape.of(self.model.config), self.model.config.get_text_config()
        parent, name = decoder_layers(self.model)
        weights = sum(p.numel() for p in getattr(parent, name).parameters()) / shape.num_layers
        projections = 2 * config.hidden_size * shape.num_kv_heads * shape.head_dim / weights
        runs = sum(layer + 1 not in self.layers for layer in range(shape.num_layers - 1))
        return (runs + (shape.num_layers - runs) * projections) / shape.num_layers

    @torch.no_grad()
    def write(self, clean: CachedTokens) -> tuple[Tensor, States]:
        """Hashes, and the states of a prefill: a cache that was filled does not tell them."""
        states: States = {}

        def keep(layer: int, hidden: Tensor) -> Tensor:
            states[layer] = self._stored(hidden)
            return hidden

        with self._at_layers(keep):
            self.model.base_model(
                input_ids=clean.ids.to(self.model.device),
                attention_mask=clean.valid.long().to(self.model.device),
                position_ids=clean.positions.clamp_min(0).to(self.model.device),
                use_cache=False,
            )
        return super().write(clean), states

    @torch.no_grad()
    def read(self, damaged: CachedTokens, kept: tuple[Tensor, States]) -> CachedTokens:
        """The cache with every changed token computed again from the states that were kept of it."""
        hashes, states = kept
        patches: list[Patch] = []

        def note(module: Any, args: Any, given: dict[str, Any]) -> None:
            patches[:] = [given["past_key_values"]]

        def put(layer: int, hidden: Tensor) -> Tensor:
            patch = patches[0]
            hidden = hidden.clone()
            hidden[patch.row, patch.place] = states[layer][patch.at].to(hidden)
            return hidden

        hook = self.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with self._at_layers(put):
                return super().read(damaged, hashes)
        finally:
            hook.remove()

    @contextmanager
    def _at_layers(self, act: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Within, the state that goes into each of the layers is what `act` makes of it."""

        def hook_of(layer: int) -> Callable[..., Any]:
            return lambda module, args: (act(layer, args[0]), *args[1:])

        parent, name = decoder_layers(self.model)
        modules = getattr(parent, name)
        hooks = [modules[layer].register_forward_pre_hook(hook_of(layer)) for layer in set(self.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _stored(self, hidden: Tensor) -> Tensor:
        """States [B, T, width] as they are read back."""
        if self.bits == WORD_BITS:
            return hidden.bfloat16() if hidden.dtype.itemsize * 8 > WORD_BITS else hidden
        every = torch.ones(hidden.shape[-1], dtype=torch.bool, device=hidden.device)
        return quantise_in_groups(hidden.float(), every, self.bits, STATE_GROUP, stored=torch.bfloat16)


def _hashes(tokens: CachedTokens) -> Tensor:
    return hashes_of(tokens.k, tokens.v, range(tokens.k.shape[1])).whole


def _middle(calibration: Calibration) -> tuple[int, ...]:
    return (max(1, calibration.shape.num_layers // 2),)


@register_defense("recompute")
def _recompute(calibration: Calibration) -> Defense:
    return TokenRecompute(calibration.model)


@register_defense("hidden_states")
def _hidden_states(calibration: Calibration) -> Defense:
    return HiddenStates(calibration.model, _middle(calibration))


@register_defense("hidden_states_8bit")
def _hidden_states_8bit(calibration: Calibration) -> Defense:
    return HiddenStates(calibration.model, _middle(calibration), 8)


@register_defense("hidden_states_all")
def _hidden_states_all(calibration: Calibration) -> Defense:
    return HiddenStates(calibration.model, tuple(range(1, calibration.shape.num_layers)))
