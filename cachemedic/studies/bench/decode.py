"""What repair costs a decoding step: folded, and materialised, against the model without repair."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.cache_utils import Cache

from cachemedic.models.shape import ModelShape
from cachemedic.repair.attach import protect
from cachemedic.repair.folded import FoldedOperator
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.registry import family_class, family_names
from cachemedic.studies.bench.materialised import RepeatableLayer, materialised
from cachemedic.studies.bench.timing import interleave, median_ratio

POSITIONS = (128, 1024, 4096, 16384)  # T, tokens in the cache
LAYERS = (10, 11, 12, 13)
RANK = 8
ROUNDS = 31
FOLDED = [name for name in family_names() if issubclass(family_class(name), FoldedOperator)]


def gpt2_medium(positions: int) -> PreTrainedModel:
    """GPT-2 medium (24 layers, width 1024, 16 heads of 64) with random weights and a table of so many positions."""
    torch.manual_seed(0)  # transformers initialises from the global generator
    config = GPT2Config(n_layer=24, n_embd=1024, n_head=16, n_positions=positions)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def random_cache(model: PreTrainedModel, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, L, G, positions, d] of random numbers."""
    of = ModelShape.of(model.config)
    shape = (1, of.num_layers, of.num_kv_heads, positions, of.head_dim)
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=numbers), torch.randn(shape, generator=numbers)


def repeatable_cache(model: PreTrainedModel, positions: int) -> Cache:
    """A cache of random numbers with `positions` tokens and a slot for one more."""
    k, v = random_cache(model, positions + 1)
    return Cache([RepeatableLayer(k[:, i], v[:, i]) for i in range(k.shape[1])])


@torch.inference_mode()
def decode(model: PreTrainedModel, cache: Cache, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One step of one token behind the cache, up to its logits [1, 1, V]; `mask` [1, T + 1]: what it may read."""
    position = torch.tensor([[cache.get_seq_length()]])
    return model(torch.tensor([[1]]), past_key_values=cache, position_ids=position, attention_mask=mask).logits


def _contender(model: PreTrainedModel, cache: Cache, operator: RepairOperator | None) -> Callable[[], float]:
    def step() -> float:
        with nullcontext() if operator is None else protect(model, operator):
            start = time.perf_counter()
            decode(model, cache)
            return time.perf_counter() - start

    return step


def overhead(
    model: PreTrainedModel,
    positions: Sequence[int] = POSITIONS,
    layers: Sequence[int] = LAYERS,
    rank: int = RANK,
    rounds: int = ROUNDS,
) -> pd.DataFrame:
    """One row for each cache length and reader: `ratio`, the time of its step over that of the plain model's.

    Readers are the families folded (A, B, C), A materialised, and the plain model a second time, which shows what the
    method resolves. Columns positions, reader, family, milliseconds, plain_milliseconds, ratio, ratio_low, ratio_high,
    rounds: medians over rounds, the ratio with a 95% interval.
    """
    rows = []
    readers: dict[str, RepairOperator | None] = {"again": None}
    for family in FOLDED:
        operator = RepairOperator.create(family, model.config, layers=layers, rank=rank)
        readers[f"folded {family}"] = operator
        if family == "A":
            assert isinstance(operator, FoldedOperator)
            readers["materialised A"] = materialised(operator)
    for length in positions:
        cache = repeatable_cache(model, length)
        contenders = {name: _contender(model, cache, op) for name, op in {"plain": None, **readers}.items()}
        times = interleave(contenders, rounds, f"decoding step behind {length} tokens")
        for name in readers:
            reader, _, family = name.partition(" ")
            ratio = median_ratio(times[name], times["plain"])
            rows.append({
                "positions": length,
                "reader": "plain" if reader == "again" else reader,
                "family": family,
                "milliseconds": 1e3 * times[name].median(),
                "plain_milliseconds": 1e3 * times["plain"].median(),
                **ratio.columns("ratio"),
                "rounds": rounds,
            })  # fmt: skip
    return pd.DataFrame(rows)
