"""The student of training: decodes M tokens over shared corrupted prefixes, starting at the first protected layer.

Rows are runs x samples; the runs of one seed (its conditions) share their prefix, which is stored once and read by the
queries of all of them: nothing is copied, and no gradient work is spent on the frozen prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from cachemedic.models.attention import attention_modules
from cachemedic.models.load import decoder_layers
from cachemedic.models.shape import decoder_depth

SHARED_PREFIX = "cachemedic_shared_prefix"


def attend_shared_prefix(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of query [S*C*B, H, M, d] over a shared prefix and the own key, value [S*C*B, G, N, d] after it.

    The queries are those of the last M of these N tokens.

    The prefix of the layer, [S, B, G, T, d], is on the module, put there by `shared_prefix`. Returns
    ([S*C*B, M, H, d], None). Raises `ValueError` for attention with a soft cap, sinks or a window that cuts the prefix.
    """
    past_key, past_value, conditions = module.shared_prefix
    rows, heads, queries, dim = query.shape
    samples, groups, length, _ = past_key.shape[-4:]
    limits = {name: options[name] for name in ("softcap", "s_aux") if options.get(name) is not None}
    if (window := options.get("sliding_window")) is not None and window < length + queries:
        limits["sliding_window"] = window
    if limits:
        raise ValueError(
            f"training cannot reproduce the attention of {type(module).__name__} over {length} + {queries} tokens with "
            f"{', '.join(f'{name}={value}' for name, value in limits.items())}"
        )
    seeds = rows // (conditions * samples)

    def by_prefix(x: torch.Tensor) -> torch.Tensor:  # [rows, H, M, n] -> [S*B*G, C*(H/G)*M, n]
        x = x.reshape(seeds, conditions, samples, groups, heads // groups, queries, -1)
        return x.permute(0, 2, 3, 1, 4, 5, 6).reshape(seeds * samples * groups, -1, x.shape[-1])

    def by_row(x: torch.Tensor) -> torch.Tensor:  # the inverse
        x = x.view(seeds, samples, groups, conditions, heads // groups, queries, -1)
        return x.permute(0, 3, 1, 2, 4, 5, 6).reshape(rows, heads, queries, -1)

    scores = by_row(by_prefix(query) @ past_key.reshape(-1, length, dim).mT)
    own_key, own_value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
    own = query @ own_key.mT
    if queries > 1:
        own = own.masked_fill(torch.ones_like(own, dtype=torch.bool).triu(1 + own.shape[-1] - queries), -torch.inf)
    weights = torch.softmax(torch.cat([scores, own], dim=-1) * scaling, dim=-1)
    output = by_row(by_prefix(weights[..., :length]) @ past_value.reshape(-1, length, dim))
    return (output + weights[..., length:] @ own_value).transpose(1, 2), None


@contextmanager
def shared_prefix(
    model: PreTrainedModel,
    keys: torch.Tensor,
    values: torch.Tensor,
    first_layer: int,
    conditions: int,
) -> Iterator[None]:
    """Within, `model` attends to the prefix `keys`, `values` [S, B, L', G, T, d] of the layers `first_layer` and up."""
    AttentionInterface.register(SHARED_PREFIX, attend_shared_prefix)
    depth = decoder_depth(model.config)
    attention = attention_modules(model, range(first_layer, depth))
    before = model.config._attn_implementation
    model.config._attn_implementation = SHARED_PREFIX
    try:
        for i, module in enumerate(attention):
            module.shared_prefix = (keys[:, :, i], values[:, :, i], conditions)
        yield
    finally:
        model.config._attn_implementation = before
        for module in attention:
            if hasattr(module, "shared_prefix"):
                del module.shared_prefix


class _Known(torch.nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        return self.output


@contextmanager
def starting_at(model: PreTrainedModel, layer: int, hidden: torch.Tensor) -> Iterator[None]:
    """Within, a forward pass skips the layers below `layer`, whose output is `hidden` [rows, M, width]."""
    parent, name = decoder_layers(model)
    layers = getattr(parent, name)
    # stand-ins, not a shorter list: some models look up what else a layer gets by its place in the list
    setattr(parent, name, torch.nn.ModuleList([_Known(hidden).eval()] * layer + [*layers[layer:]]))
    try:
        yield
    finally:
        setattr(parent, name, layers)
