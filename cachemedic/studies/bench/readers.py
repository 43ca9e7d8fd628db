"""What every reader of a cache costs a decoding step, in time and in memory: blind defenses and operator families.

A fault may have struck since the last step, so a blind defense treats the whole cache at every read, as a folded
operator does. D and E repair a cache when it is loaded; after that a step costs what a `SketchCache` does with the new
token: its hash, and for E one code of a page in 16 steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.defenses.heuristics import blind_defenses
from cachemedic.defenses.registry import Calibration
from cachemedic.repair.attach import protect
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.registry import family_class
from cachemedic.studies.bench.decode import RANK, decode, random_cache
from cachemedic.studies.bench.materialised import PresetLayer, RepeatableLayer
from cachemedic.studies.bench.memory import peak_bytes
from cachemedic.studies.bench.random_operator import random_operator
from cachemedic.studies.bench.timing import interleave, median_ratio
from cachemedic.token.cache import PAGE, SketchCache

PLAIN = "none"
OPERATOR = "operator "  # and the name of the family


class RoomyLayer(PresetLayer):
    """A cache layer whose last places [B, G, T + room, d] are free: nothing is copied as it fills up."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: int) -> None:
        super().__init__(keys, values)
        self.filled = filled

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the token [B, G, 1, d] into the next place; returns all that is filled."""
        self.keys[:, :, self.filled : self.filled + 1] = key_states
        self.values[:, :, self.filled : self.filled + 1] = value_states
        self.filled += 1
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        """Places that are filled."""
        return self.filled


def _tokens(k: torch.Tensor, v: torch.Tensor) -> CachedTokens:
    ids = torch.zeros(k.shape[0], k.shape[3], dtype=torch.long)
    return CachedTokens.behind_padding(k, v, ids, torch.ones_like(ids, dtype=torch.bool))


def _through(model: PreTrainedModel, cache: CachedTokens, defense: Defense) -> torch.Tensor:
    """One decoding step on what the defense makes of the cache; the last of the positions is the token's own."""
    read = defense.read(cache, None)
    if (mask := read.readable) is not None:
        mask[:, -1] = True
    return decode(model, Cache([RepeatableLayer(read.k[:, i], read.v[:, i]) for i in range(read.k.shape[1])]), mask)


@dataclass(frozen=True, eq=False)
class _Step:
    """A decoding step of one reader, again and again: `work`, after `prepare`, with an operator attached if there is
    one; steps: how many `work` takes; kept: the bytes that the reader keeps of the tokens beside their cache.
    """

    model: PreTrainedModel
    work: Callable[[], object]
    operator: RepairOperator | None = None
    prepare: Callable[[], None] = lambda: None
    steps: int = 1
    kept: int = 0

    def seconds(self) -> float:
        """How long a step takes; attaching the operator, done once for many steps, is left out."""
        self.prepare()
        with self.attached():
            start = time.perf_counter()
            self.work()
            return (time.perf_counter() - start) / self.steps

    def peak(self) -> int:
        """The most bytes of tensors that it makes, and what is kept."""
        self.prepare()
        with self.attached():
            return peak_bytes(self.work) + self.kept

    def attached(self) -> AbstractContextManager:
        return nullcontext() if self.operator is None else protect(self.model, self.operator)


def _steps(
    model: PreTrainedModel, k: torch.Tensor, v: torch.Tensor, families: Iterable[str], rank: int
) -> dict[str, _Step]:
    """Every reader's, by name, on the cache k, v [1, L, G, T + 1, d], whose last position is free."""
    cache = _tokens(k, v)
    defenses = blind_defenses(Calibration(model, cache))

    def through(defense: Defense) -> Callable[[], torch.Tensor]:
        return lambda: _through(model, cache, defense)

    steps = {name: _Step(model, through(defense)) for name, defense in defenses.items()}
    for family in families:
        if not family_class(family).repairs_tokens:
            layers = range(model.config.num_hidden_layers)
            operator = RepairOperator.create(family, model.config, layers=layers, rank=rank)
            steps[OPERATOR + family] = _Step(model, through(defenses[PLAIN]), operator)
        else:
            steps[OPERATOR + family] = _looked_after(model, k, v, family)
    return steps


def _looked_after(model: PreTrainedModel, k: torch.Tensor, v: torch.Tensor, family: str) -> _Step:
    """Steps that fill a page of a cache which keeps ids, hashes, and with family E codes of its tokens."""
    length = k.shape[3] - 1
    cache = SketchCache(model, random_operator(model, family))
    roomy = [F.pad(x[..., :length, :], (0, 0, 0, PAGE)) for x in (k, v)]
    layers: list[Any] = [RoomyLayer(roomy[0][:, i], roomy[1][:, i], length) for i in range(k.shape[1])]
    cache.adopt(Cache(layers), torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None])
    record = cache.kept

    def forget_the_last_steps() -> None:
        cache.record = record
        for layer in layers:
            layer.filled = length

    def fill_a_page() -> None:
        for _ in range(PAGE):
            decode(model, cache)

    return _Step(model, fill_a_page, prepare=forget_the_last_steps, steps=PAGE, kept=record.nbytes)


@torch.inference_mode()
def reading_cost(
    model: PreTrainedModel, positions: Sequence[int], families: Iterable[str], rounds: int, rank: int = RANK
) -> pd.DataFrame:
    """One row for each cache length and reader, the plain model ("none") among them; operators protect all layers.

    Columns positions, reader, milliseconds, ratio (of the reader's step to the plain one), ratio_low, ratio_high
    (medians over rounds, the ratio with a 95% interval), rounds, and peak_mebibytes: what tensors take at most during a
    step beside model and cache, and with what the reader keeps of the tokens, counted, not timed.
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
                **ratio.columns("ratio"),
                "rounds": rounds,
                "peak_mebibytes": step.peak() / 2**20,
            })  # fmt: skip
    return pd.DataFrame(rows)
