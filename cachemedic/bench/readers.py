"""What every reader of a cache costs a decoding step, in time and in memory: blind defences and operator families.

A fault may have struck since the last step, so a blind defence treats the whole cache at every read, as an operator
does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cachemedic.attention import protect
from cachemedic.bench.decode import RANK, decode
from cachemedic.bench.materialised import RepeatableLayer
from cachemedic.bench.memory import peak_bytes
from cachemedic.bench.timing import interleave, median_ratio
from cachemedic.clean_ranges import CacheStatistics
from cachemedic.defenses import Defence, blind_defences
from cachemedic.operator_config import ModelShape
from cachemedic.operators import RepairOperator

PLAIN = "none"
OPERATOR = "operator "  # and the name of the family


def random_cache(model: PreTrainedModel, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, L, G, positions, d] of random numbers."""
    of = ModelShape.of(model.config)
    shape = (1, of.num_layers, of.num_kv_heads, positions, of.head_dim)
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=numbers), torch.randn(shape, generator=numbers)


def _through(model: PreTrainedModel, k: torch.Tensor, v: torch.Tensor, defence: Defence) -> torch.Tensor:
    """One decoding step on what the defence makes of the cache; the last of the positions is the token's own."""
    read = defence(k, v, torch.ones(k.shape[0], k.shape[3], dtype=torch.bool))
    if (mask := read.keep) is not None:
        mask[:, -1] = True
    return decode(model, Cache([RepeatableLayer(read.k[:, i], read.v[:, i]) for i in range(k.shape[1])]), mask)


@dataclass(frozen=True, eq=False)
class _Step:
    """A decoding step of one reader on the cache k, v, whose last position is free."""

    model: PreTrainedModel
    k: torch.Tensor
    v: torch.Tensor
    defence: Defence
    operator: RepairOperator | None = None

    def __call__(self) -> torch.Tensor:
        return _through(self.model, self.k, self.v, self.defence)

    def seconds(self) -> float:
        """How long it takes; attaching the operator, done once for many steps, is left out."""
        with self.attached():
            start = time.perf_counter()
            self()
            return time.perf_counter() - start

    def peak(self) -> int:
        """The most bytes of tensors that it makes."""
        with self.attached():
            return peak_bytes(self)

    def attached(self) -> AbstractContextManager:
        return nullcontext() if self.operator is None else protect(self.model, self.operator)


def _steps(
    model: PreTrainedModel, k: torch.Tensor, v: torch.Tensor, families: Iterable[str], rank: int
) -> dict[str, _Step]:
    """Every reader's, by name."""
    defences = blind_defences(CacheStatistics.measure(k, v, torch.ones(1, k.shape[3], dtype=torch.bool)))
    steps = {name: _Step(model, k, v, defence) for name, defence in defences.items()}
    for family in families:
        operator = RepairOperator.create(family, model.config, layers=range(model.config.num_hidden_layers), rank=rank)
        steps[OPERATOR + family] = _Step(model, k, v, defences[PLAIN], operator)
    return steps


@torch.inference_mode()
def reading_cost(
    model: PreTrainedModel, positions: Sequence[int], families: Iterable[str], rounds: int, rank: int = RANK
) -> pd.DataFrame:
    """One row for each cache length and reader, the plain model ("none") among them; operators protect all layers.

    Columns positions, reader, milliseconds, ratio (of the reader's step to the plain one), ratio_low, ratio_high
    (medians over rounds, the ratio with a 95% interval), rounds, and peak_mebibytes: what tensors take at most during a
    step beside model and cache, counted, not timed.
    """
    rows = []
    families = tuple(families)
    for length in positions:
        k, v = random_cache(model, length + 1)
        steps = _steps(model, k, v, families, rank)
        times = interleave({name: step.seconds for name, step in steps.items()}, rounds, f"step behind {length} tokens")
        for name, step in steps.items():
            ratio = median_ratio(times[name], times[PLAIN])
            rows.append({
                "positions": length,
                "reader": name,
                "milliseconds": 1e3 * times[name].median(),
                "ratio": ratio.estimate,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "rounds": rounds,
                "peak_mebibytes": step.peak() / 2**20,
            })  # fmt: skip
    return pd.DataFrame(rows)
