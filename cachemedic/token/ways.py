"""The ways to repair damaged tokens, carried out on a cache."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cachemedic.token.check import CheckReport
from cachemedic.token.hashes import believed
from cachemedic.token.joint import SINKS
from cachemedic.token.policy import WAY, Policy
from cachemedic.token.recompute import clear, recompute_tokens
from cachemedic.token.record import TokenRecord
from cachemedic.token.recorded_cache import RecordedCache
from cachemedic.token.repair_report import RepairReport

PIECE = 512  # tokens whose vectors are held at once


@torch.inference_mode()
def carry_out(cache: RecordedCache, report: CheckReport, policy: Policy) -> RepairReport:
    """Repairs the damage of a report in place. Exact tokens are computed last, behind those that were restored."""
    start = time.perf_counter()
    record = cache.kept
    ways = policy.choose(report, record)
    for way in ("restore", "estimate"):
        for rows, slots in _pieces(ways == WAY[way]):
            _rewrite(cache, way, rows, slots, report.parts)
    erased, damaged = ways == WAY["erase"], ways == WAY["recompute"]
    layers: list[Any] = cache.layers
    clear(layers, erased)  # attention multiplies them by zero, and what is not finite would be left
    back = record.erased & damaged
    cache.record = record = replace(record, erased=record.erased & ~back | erased)
    if damaged.any():
        recompute_tokens(cache.model, layers, record.ids, damaged, record.valid, record.positions.clamp_min(0))
    if back.any():
        cache.record = record = _coded_again(cache, back)
    partly = _partly_covered(cache, ways, report.parts)
    changed = (ways != WAY["sound"]) & (ways != WAY["leave"]) & ~partly
    verified = 0
    if changed.any():
        now = cache.hasher.of(*cache.numbers())
        verified = int(((now.whole == record.hashes.whole) & damaged).sum())
        cache.record = replace(record, hashes=record.hashes.replaced(changed, now))
    taken = {way: int((ways == number).sum()) for way, number in WAY.items() if way != "sound"}
    return RepairReport(
        found=report,
        way_numbers=ways,
        verified=verified,
        not_covered=int(partly.sum()),
        expected_kl=None if partly.any() else _expected_kl(cache, taken),
        seconds=time.perf_counter() - start,
        budget=policy.budget,
        expected_share=None if policy.costs is None else policy.share(taken),
        not_recomputed=policy.why_not.get("recompute"),
    )


def _coded_again(cache: RecordedCache, tokens: Tensor) -> TokenRecord:
    """The record of a cache, of which `tokens`, bool [B, T], are there again: a code may be of when they were not."""
    record = cache.kept
    tokens = tokens[:, : record.codes.shape[1]]
    slots = tokens.any(0).nonzero().squeeze(1)
    if cache.coder is None or not cache.coder.bytes_per_token or not len(slots):
        return record
    first, last = int(slots[0]), int(slots[-1]) + 1
    codes = record.codes.clone()
    new = cache.coder.encode(*cache.numbers(), record, slice(first, last))
    codes[:, first:last] = torch.where(tokens[:, first:last, None], new, codes[:, first:last])
    return replace(record, codes=codes)


def _partly_covered(cache: RecordedCache, ways: Tensor, parts: Tensor) -> Tensor:
    """Tokens [B, T] that the operator repairs, with damaged `parts` [B, T, L, 2] that it does not cover."""
    found = torch.zeros_like(ways, dtype=torch.bool)
    for way in ("restore", "estimate"):
        if (taken := ways == WAY[way]).any():
            assert cache.coder is not None  # the policy saw to it
            found |= taken & (parts & ~cache.coder.covered(way).to(parts.device)).flatten(2).any(2)
    return found


def _pieces(tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows, slots = tokens.nonzero(as_tuple=True)
    return list(zip(rows.split(PIECE), slots.split(PIECE), strict=True)) if len(rows) else []


def _rewrite(cache: RecordedCache, way: str, rows: Tensor, slots: Tensor, parts: Tensor) -> None:
    """Puts what the operator says in the place of damaged `parts` [B, T, L, 2] of tokens (rows[i], slots[i])."""
    coder, record = cache.coder, cache.kept
    layers: list[Any] = cache.layers
    assert coder is not None  # the policy saw to it
    agree = ~parts[rows, slots]
    some = agree.flatten(1).any(1)
    agree[some] = believed(agree[some], _largest(layers, rows[some], slots[some]))
    damaged = ~agree
    run = slice(int(slots[0]), int(slots[-1]) + 1)
    in_a_run = bool(rows[0] == rows[-1]) and run.stop - run.start == len(slots)
    at = (int(rows[0]), run) if in_a_run else (rows, slots)  # a slice is copied several times as fast
    if way == "restore":
        new = coder.restore(record, rows, slots)
    else:
        stored = cache.numbers()
        read = [torch.stack([side[layer].transpose(1, 2)[at] for layer in coder.layers], 1) for side in stored]
        new = coder.estimate(record, rows, slots, read[0], read[1], ~damaged[:, list(coder.layers)])
    for layer, found in zip(coder.layers, new, strict=True):
        for number, stored_side in enumerate((layers[layer].keys, layers[layer].values)):
            hit = damaged[:, layer, number]
            if in_a_run and hit.all():
                stored_side.transpose(1, 2)[at].copy_(found[number])
            else:
                _put(stored_side, rows[hit], slots[hit], found[number][hit])
    first = record.positions[rows, slots] < SINKS
    if first.any():
        rows, slots = rows[first], slots[first]
        sinks = record.sinks[rows, record.positions[rows, slots]]
        for number, layer in enumerate(layers):
            _put(layer.keys, rows, slots, sinks[:, number, 0])
            _put(layer.values, rows, slots, sinks[:, number, 1])


def _largest(layers: list[Any], rows: Tensor, slots: Tensor) -> Tensor:
    """The largest magnitude of the keys and values of tokens, [N, L, 2]."""
    sides = [(layer.keys, layer.values) for layer in layers]
    at = rows.to(sides[0][0].device), slice(None), slots.to(sides[0][0].device)
    found = [torch.stack([x[at].abs().amax((1, 2)) for x in pair], -1) for pair in sides]
    return torch.stack(found, 1).to(rows.device)


def _put(stored: Tensor, rows: Tensor, slots: Tensor, new: Tensor) -> None:
    """Writes tokens `new` [N, G, d] where they belong in `stored` [B, G, T, d]."""
    stored[rows.to(stored.device), :, slots.to(stored.device)] = new.to(stored)


def _expected_kl(cache: RecordedCache, taken: dict[str, int]) -> float | None:
    """Nats, in proportion to the tokens of each way and to all that are erased; None where a way was not measured."""
    record = cache.kept
    taken = taken | {"erase": int((record.erased & (record.positions >= 0)).sum())}
    known = {"recompute": 0.0} | ({} if cache.operator is None else cache.operator.expected_kl)
    if any(count and way not in known for way, count in taken.items()):
        return None
    total = int((record.positions >= 0).sum())
    return sum(known[way] * count for way, count in taken.items() if count) / total
