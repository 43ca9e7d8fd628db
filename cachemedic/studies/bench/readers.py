"""What every reader of a cache costs a decoding step, in time and in memory: blind defenses and operator families.

A fault may have struck since the last step, so a blind defense treats the whole cache at every read, as a folded
operator does. D and E are read in two ways: "write-back", behind a cache that was scrubbed when it was loaded, where E
writes the sketch of each new token, and "augmented", of a repair that is kept beside the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.defenses.heuristics import blind_defenses
from cachemedic.defenses.registry import Calibration
from cachemedic.repair.attach import protect
from cachemedic.repair.folded import FoldedOperator
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.registry import family_class
from cachemedic.studies.bench.augmented import random_repair, wide_cache
from cachemedic.studies.bench.decode import RANK, decode, random_cache
from cachemedic.studies.bench.materialised import RepeatableLayer
from cachemedic.studies.bench.memory import peak_bytes
from cachemedic.studies.bench.scrub import uncalibrated
from cachemedic.studies.bench.timing import interleave, median_ratio
from cachemedic.token.layerwise import LAYERWISE
from cachemedic.token.layerwise.augmented import AugmentedRead
from cachemedic.token.layerwise.sketch_cache import SketchCache
from cachemedic.token.layerwise.token_record import TokenRecord

PLAIN = "none"
OPERATOR = "operator "  # and the name of the family, and how D and E are read
WRITE_BACK, AUGMENTED = ", write-back", ", augmented"


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
    one; kept: the bytes that the reader keeps of the tokens beside their cache.
    """

    model: PreTrainedModel
    work: Callable[[], torch.Tensor]
    operator: RepairOperator | AugmentedRead | None = None
    prepare: Callable[[], None] = lambda: None
    kept: int = 0

    def seconds(self) -> float:
        """How long it takes; attaching the operator, done once for many steps, is left out."""
        self.prepare()
        with self.attached():
            start = time.perf_counter()
            self.work()
            return time.perf_counter() - start

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
        if issubclass(family_class(family), FoldedOperator):
            layers = range(model.config.num_hidden_layers)
            operator = RepairOperator.create(family, model.config, layers=layers, rank=rank)
            steps[OPERATOR + family] = _Step(model, through(defenses[PLAIN]), operator)
        else:
            name = OPERATOR + family.removeprefix(LAYERWISE)
            steps[name + WRITE_BACK] = _written_back(model, k, v, family)
            steps[name + AUGMENTED] = _augmented(model, k, v, family, rank)
    return steps


def _written_back(model: PreTrainedModel, k: torch.Tensor, v: torch.Tensor, family: str) -> _Step:
    """A step on a cache that keeps the record of its tokens, and E the sketch, of which that of the new one is made."""
    operator, length = uncalibrated(model, family), k.shape[3] - 1
    cache = SketchCache(model, operator)
    cache.layers = [RepeatableLayer(k[:, i], v[:, i]) for i in range(k.shape[1])]
    positions = torch.arange(length)[None]
    sketch = torch.zeros(1, length, cache.bytes_per_token, dtype=torch.uint8)
    last = None if operator.code is None else torch.zeros(len(operator.layers), 1, 1, operator.code.chain.shape[-1])
    record = TokenRecord(torch.zeros_like(positions), positions, sketch, last)

    def forget_the_last_step() -> None:
        cache.record = record

    kept = sum(x.nbytes for x in (record.ids, positions, sketch))
    return _Step(model, lambda: decode(model, cache), operator, forget_the_last_step, kept)


def _augmented(model: PreTrainedModel, k: torch.Tensor, v: torch.Tensor, family: str, rank: int) -> _Step:
    """A step that reads a repair beside the cache, which is laid out in wide heads."""
    read = random_repair(model, range(k.shape[1]), rank, k.shape[3] - 1, family)
    cache = wide_cache(read, k, v)
    return _Step(model, lambda: decode(model, cache), read, kept=sum(tail.nbytes for tail in read.tails))


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
