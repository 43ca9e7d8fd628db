"""What a model says behind a given cache: teacher-forced decoding, simulated futures, and the states within."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from cachemedic.models.load import decoder_layers
from cachemedic.repair.attach import protect
from cachemedic.repair.operator import RepairOperator
from cachemedic.training.bank import Bank
from cachemedic.training.student import shared_prefix


@dataclass(frozen=True)
class Read:
    """The caches that the students read, N x B of them from layer `first` on: N * `conditions` runs, seed-major."""

    keys: torch.Tensor  # [N, B, L', G, T, d]
    values: torch.Tensor
    conditions: int  # runs that read one cache: those of a seed (N = S), or 1 where each has its own (N = R)
    first: int

    @classmethod
    def clean(cls, bank: Bank, rows: torch.Tensor, device: torch.device) -> Read:
        """The sound caches of the bank's `rows` [S, B]."""
        return cls(bank.keys[rows].to(device), bank.values[rows].to(device), conditions=1, first=0)


@dataclass
class Observation:
    """The states of the last forward pass, [rows, M, width] a layer: `hidden` after each layer, the last as the output
    layer reads it; `attention`: what each attention module adds to the residual stream."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def observing(model: PreTrainedModel) -> Iterator[Observation]:
    """Within, every forward pass of `model` leaves its states in what is yielded."""
    states = Observation()
    parent, name = decoder_layers(model)
    layers = getattr(parent, name)
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]

    def begin(module: torch.nn.Module, args: tuple) -> None:
        states.hidden.clear()
        states.attention.clear()

    hooks = [layers[0].register_forward_pre_hook(begin)]
    hooks += [layer.register_forward_pre_hook(lambda m, args: states.hidden.append(args[0])) for layer in layers[1:]]
    head = model.get_output_embeddings()
    hooks.append(head.register_forward_pre_hook(lambda m, args: states.hidden.append(args[0])))
    for module in modules:
        hooks.append(module.register_forward_hook(lambda m, args, out: states.attention.append(out[0])))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def reading(model: PreTrainedModel, read: Read, operator: RepairOperator | None) -> Iterator[None]:
    """Within, `model` decodes behind the caches of `read` (all its layers), through `operator` if there is one.

    An operator that repairs stored tokens has repaired `read` itself.
    """
    keys, values = read.keys.to(model.dtype), read.values.to(model.dtype)
    with (
        shared_prefix(model, keys, values, read.first, read.conditions),
        nullcontext() if operator is None or operator.repairs_tokens else protect(model, operator),
    ):
        yield


def decode(model: PreTrainedModel, ids: torch.Tensor, start: int) -> torch.Tensor:
    """Logits [rows, M, V] of tokens [rows, M] at the positions from `start` on; call it within `reading`."""
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(len(ids), -1)
    return model(ids, position_ids=positions, use_cache=False).logits.float()


@torch.no_grad()
def roll_out(
    model: PreTrainedModel,
    first: torch.Tensor,
    start: int | torch.Tensor,
    steps: int,
    noise: torch.Tensor | None,
    cache: DynamicCache | None = None,
    readable: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`steps` simulated tokens after `first` [rows] at position `start` (one, or one a row [rows]).

    noise [rows, steps] in [0, 1) picks each token by the inverse of the distribution function; None: the likeliest.
    The model reads the past from `cache`, of which it may attend to `readable`, bool [rows, T]; without a cache call it
    within `reading`. Returns the tokens [rows, steps] and the last hidden states [rows, steps, width] from which they
    were drawn.
    """
    cache, token = DynamicCache() if cache is None else cache, first
    tokens, hidden = [], []
    with observing(model) as states:
        for step in range(steps):
            positions = torch.as_tensor(start, device=first.device).expand(len(first))[:, None] + step
            if readable is not None:
                readable = F.pad(readable, (0, 1), value=True)
            output = model(
                token[:, None],
                attention_mask=None if readable is None else readable.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1].float()
            if noise is None:
                token = logits.argmax(-1)
            else:
                up_to = torch.softmax(logits, -1).cumsum(-1)
                u = noise[:, step : step + 1].to(up_to) * up_to[:, -1:]  # rounding leaves sums a little off 1
                token = torch.searchsorted(up_to, u, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
            tokens.append(token)
            hidden.append(states.hidden[-1][:, -1])
    return torch.stack(tokens, 1), torch.stack(hidden, 1)
