"""What a defense does to the cache itself: the error that it leaves in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.core.divergence import EPS, cache_norm, error_ratio
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.defense import Defense
from cachemedic.evaluation.decoding import CleanBank, decode_logits, tokens_of
from cachemedic.evaluation.evaluate import corrupt_examples
from cachemedic.repair.folded import QueryGatedAdditive
from cachemedic.repair.operator import RepairOperator


class _QueryProbe(QueryGatedAdditive):
    """An untrained operator, the identity, that keeps the queries it sees."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.queries: dict[int, list[Tensor]] = defaultdict(list)

    def attend(self, layer: int, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
        self.queries[layer].append(query)
        return super().attend(layer, attention, query, key, value)


def queries_of(model: PreTrainedModel, clean: CleanBank, task: TaskData) -> Tensor:
    """The queries [N, L, H, M, d] of the continuations, decoded on the clean caches."""
    depth = model.config.get_text_config().num_hidden_layers
    identity = RepairOperator.create("A", model.config, layers=range(depth), rank=1)
    probe = _QueryProbe(identity.config, dict(identity.named_parameters()))
    decode_logits(model, clean.tokens(task), task, probe)
    return torch.stack([torch.cat(probe.queries[layer]) for layer in range(depth)], 1)


@torch.inference_mode()
def repair_quality(
    model: PreTrainedModel, task: TaskData, clean: CleanBank, spec: CorruptionSpec, defenses: Mapping[str, Defense]
) -> pd.DataFrame:
    """The error that defenses leave in the caches of a task, one row per defense and seed.

    rho, rho_k, rho_v: norms left over norms found, means over examples and layers (layers without damage left out);
    score_error: the same for the attention scores q k of the continuation's queries. Examples of several runs are
    run-major.
    """
    k, v, _ = corrupt_examples(clean, task, spec, np.arange(len(task)))
    written, found_damaged = clean.tokens(task), tokens_of(task, k, v)
    queries = queries_of(model, clean, task)
    rows = []
    for name, defense in defenses.items():
        read = defense.read(found_damaged, defense.write(written))
        errors = {
            "k": (cache_norm(read.k - clean.k), cache_norm(torch.nan_to_num(k) - clean.k)),
            "v": (cache_norm(read.v - clean.v), cache_norm(torch.nan_to_num(v) - clean.v)),
            "s": (_scores(queries, read.k - clean.k), _scores(queries, torch.nan_to_num(k) - clean.k)),
        }
        left, found = (errors["k"][i] + errors["v"][i] for i in (0, 1))
        ratios = {"rho": _ratio(left, found), "rho_k": _ratio(*errors["k"]), "rho_v": _ratio(*errors["v"])}
        frame = pd.DataFrame({**ratios, "score_error": _ratio(*errors["s"])}).groupby(task.seeds.numpy()).mean()
        for seed, means in frame.iterrows():
            rows.append({"reader": name, "seed": seed, **means.to_dict()})
    return pd.DataFrame(rows)


def _scores(queries: Tensor, error: Tensor) -> Tensor:
    """Norms [B, L] of what errors of keys [B, L, G, T, d] do to attention scores."""
    repeats = queries.shape[2] // error.shape[2]
    return cache_norm(queries @ error.repeat_interleave(repeats, 2).mT)


def _ratio(left: Tensor, found: Tensor) -> np.ndarray:
    """Means [B] over the layers in which there was something to find."""
    hit = found > EPS
    ratio = torch.where(hit, error_ratio(left, found), 0).sum(1) / hit.sum(1).clamp_min(1)
    return torch.where(hit.any(1), ratio, torch.nan).numpy()
