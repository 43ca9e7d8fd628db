"""The student of training: decodes M tokens over shared corrupted prefixes, starting at the first protected layer.

Rows are runs x samples; the runs of one seed (its conditions) share their prefix, which is stored once and read by the
queries of all of them: nothing is copied, and no gradient work is spent on the frozen prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedModel

from cachemedic.models import decoder_layers

SHARED_PREFIX = "cachemedic_shared_prefix"


def attend_shared_prefix(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention of query [S*C*B, H, M, d] over a shared prefix [S*B, G, T, d] and the M tokens' own key, value (causal).

    The prefix of the layer is on the module, put there by `shared_prefix`. Returns ([S*C*B, M, H, d], None).
    """
    past_key, past_value, conditions = module.shared_prefix
    rows, heads, queries, dim = query.shape
    samples, groups, length, _ = past_key.shape[-4:]
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
        own = own.masked_fill(torch.ones_like(own, dtype=torch.bool).triu(1), -torch.inf)
    weights = torch.softmax(torch.cat([scores, own], dim=-1) * scaling, dim=-1)
    output = by_row(by_prefix(weights[..., :length]) @ past_value.reshape(-1, length, dim))
    return (output + weights[..., length:] @ own_value).transpose(1, 2), None


@contextmanager
def shared_prefix(
    model: PreTrainedModel, keys: torch.Tensor, values: torch.Tensor, first_layer: int, conditions: int
) -> Iterator[None]:
    """Within, `model` attends to the prefix `keys`, `values` [S, B, L', G, T, d] of the layers from `first_layer` on."""
    AttentionInterface.register(SHARED_PREFIX, attend_shared_prefix)
    attention = {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")}
    before = model.config._attn_implementation
    model.config._attn_implementation = SHARED_PREFIX
    try:
        for layer in range(first_layer, model.config.num_hidden_layers):
            i = layer - first_layer
            attention[layer].shared_prefix = (keys[:, :, i], values[:, :, i], conditions)
        yield
    finally:
        model.config._attn_implementation = before
        for module in attention.values():
            if hasattr(module, "shared_prefix"):
                del module.shared_prefix


@contextmanager
def starting_at(model: PreTrainedModel, layer: int, hidden: torch.Tensor) -> Iterator[None]:
    """Within, a forward pass skips the layers below `layer`, whose output is `hidden` [rows, M, width]."""
    if layer == 0:
        yield
        return
    parent, name = decoder_layers(model)
    layers = getattr(parent, name)

    def replace(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (hidden, *args[1:]), kwargs

    hook = layers[layer].register_forward_pre_hook(replace, with_kwargs=True)
    setattr(parent, name, layers[layer:])
    try:
        yield
    finally:
        setattr(parent, name, layers)
        hook.remove()
