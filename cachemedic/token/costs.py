"""What a repair takes on this machine, measured once for each model and operator."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cachemedic.token.coder import Coder
from cachemedic.token.hashes import Hashes
from cachemedic.token.record import TokenRecord

LENGTHS = (16, 64, 256)  # tokens of the passes that are measured
ROUNDS, SECONDS = 3, 0.1  # of each, at least: of all rounds the quickest counts, as others were disturbed


@dataclass(frozen=True)
class CostModel:
    """Seconds of a pass: fixed + tokens (a_token + a_pair keys), keys being what each token attends to in the mean.

    by_way: (fixed, a token) seconds of restore and estimate, where there is an operator.
    """

    fixed: float
    a_token: float
    a_pair: float
    by_way: dict[str, tuple[float, float]] = field(default_factory=dict)

    def prefill(self, tokens: int, length: int) -> float:
        """Of `tokens` in all rows, in rows of `length`."""
        return self.fixed + tokens * (self.a_token + self.a_pair * length / 2)

    def seconds(self, way: str, tokens: int, length: int) -> float:
        """Of repairing so many tokens of a cache of `length`. Erasing takes no time."""
        if tokens == 0 or way in ("erase", "leave"):
            return 0.0
        if way == "recompute":
            return self.fixed + tokens * (self.a_token + self.a_pair * length)
        fixed, a_token = self.by_way[way]
        return fixed + tokens * a_token


_measured: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, CostModel]] = weakref.WeakKeyDictionary()


def costs_of(model: PreTrainedModel, coder: Coder | None, ways: tuple[str, ...]) -> CostModel:
    """Measured now, for about as long as twelve passes over a few hundred tokens take, or known from before in this
    process.
    """
    known = _measured.setdefault(model, weakref.WeakKeyDictionary())
    key: Any = model if coder is None else coder.operator
    if key not in known or not set(ways) & {"restore", "estimate"} <= set(known[key].by_way):
        known[key] = _measure(model, coder, tuple(way for way in ways if way in ("restore", "estimate")))
    return known[key]


@torch.inference_mode()
def _measure(model: PreTrainedModel, coder: Coder | None, ways: tuple[str, ...]) -> CostModel:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    lengths = [min(length, context or length) for length in LENGTHS]
    ids = torch.arange(max(lengths), device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    seconds = [_time(partial(_prefill, model, ids[:, :n])) for n in lengths]
    # over the seconds of each pass, as a short one matters as much, and never below zero: times are noisy
    system = np.array([[1.0, n, n * n / 2] for n in lengths]) / np.array(seconds)[:, None]
    fixed, a_token, a_pair = nnls(system, np.ones(len(lengths)))[0].tolist()
    by_way = {}
    if coder is not None:
        for way in ways:
            few, many = (_time(partial(_repair, coder, ids[:, :n], way)) for n in (lengths[0], lengths[-1]))
            slope = max(0.0, (many - few) / max(1, lengths[-1] - lengths[0]))
            by_way[way] = (max(0.0, few - slope * lengths[0]), slope)
    return CostModel(fixed, a_token, a_pair, by_way)


def _prefill(model: PreTrainedModel, ids: Tensor) -> None:
    model.base_model(ids, attention_mask=torch.ones_like(ids), past_key_values=DynamicCache(), use_cache=True)


def _repair(coder: Coder, ids: Tensor, way: str) -> None:
    """Repairs tokens of no content: it takes as long as any."""
    count = ids.shape[1]
    rows, slots = torch.zeros_like(ids[0]), torch.arange(count, device=ids.device)
    nothing = torch.zeros(1, 0, device=ids.device)
    record = TokenRecord(
        ids,
        slots[None],
        Hashes(nothing, nothing),
        slots[None] < 0,
        torch.zeros(1, count if coder.code else 0, coder.bytes_per_token, dtype=torch.uint8, device=ids.device),
        nothing,
    )
    if way == "restore":
        list(coder.restore(record, rows, slots))
        return
    shape = count, len(coder.layers), coder.vectors.heads, coder.vectors.head_dim
    numbers = torch.ones(shape, dtype=coder.model.dtype, device=ids.device)
    list(coder.estimate(record, rows, slots, numbers, numbers, torch.zeros(*shape[:2], 2).bool().to(ids.device)))


def _time(act: Callable[[], Any]) -> float:
    """The least seconds of some rounds, after one that does not count."""
    act()
    found: list[float] = []
    while len(found) < ROUNDS or sum(found) < SECONDS:
        start = _now()
        act()
        found.append(_now() - start)
    return min(found)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
