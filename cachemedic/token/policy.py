"""Which way each damaged token is repaired: the one of least expected KL within a budget of time."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from cachemedic.core.errors import nearest_valid, shown
from cachemedic.models.usable import check_mode
from cachemedic.token.check import CheckReport
from cachemedic.token.costs import CostModel, costs_of
from cachemedic.token.damage_kinds import NUMBER
from cachemedic.token.dense import check_can_recompute
from cachemedic.token.joint import SINKS
from cachemedic.token.record import TokenRecord
from cachemedic.token.recorded_cache import RecordedCache

WAYS = ("sound", "recompute", "estimate", "restore", "erase", "leave")  # by what they leave, least first
WAY = {way: number for number, way in enumerate(WAYS)}
METHODS = ("auto", "recompute", "restore", "estimate", "erase")
MILD = 1 / 8  # of a token's keys and values: one with less damage, all of it finite, is worth more than none


class Policy:
    """How the damage of one cache is to be repaired; see `SketchCache.repair`.

    Raises `ValueError` for an unknown method, for one that the operator or the model cannot serve, for a negative
    budget, and for a model in training mode.
    """

    def __init__(self, cache: RecordedCache, method: str, budget: float | None) -> None:
        if method not in METHODS:
            raise nearest_valid("method of repair", method, METHODS)
        if budget is not None and (not isinstance(budget, Real) or isinstance(budget, bool)):
            raise TypeError(f"the budget must be a number, a share of a prefill, not {shown(budget)}")
        if budget is not None and not budget >= 0:
            raise ValueError(f"the budget must be a share of a prefill, 0 or more, not {budget}")
        check_mode(cache.model)  # it may have changed since the cache was made
        self.method, self.budget = method, budget
        self.length = len(cache.kept)
        self.tokens = int((cache.kept.positions >= 0).sum())  # of all rows
        self.ways = self._open_to(cache)
        if method != "auto" and method not in self.ways:
            raise ValueError(self.why_not[method])
        self.costs: CostModel | None = None
        if budget is not None:
            self.costs = costs_of(cache.model, cache.coder, self.ways)

    def _open_to(self, cache: RecordedCache) -> tuple[str, ...]:
        """The ways that can be taken."""
        self.why_not: dict[str, str] = {}
        try:
            check_can_recompute(cache.model, self.length)
        except ValueError as error:
            self.why_not["recompute"] = str(error)
        if cache.coder is None:
            self.why_not["restore"] = self.why_not["estimate"] = (
                "this cache has no operator that knows clean tokens: make it with SketchCache(model, operator)"
            )
        return tuple(way for way in ("recompute", "estimate", "restore", "erase") if way not in self.why_not)

    def choose(self, report: CheckReport, record: TokenRecord) -> Tensor:
        """The number in `WAYS` [B, T] of what is done with each token."""
        ways = torch.zeros_like(report.kind_numbers)
        ways[report.changed & ~record.valid] = WAY["erase"]
        rows, slots = _by_worth(report.changed & record.valid, record.positions)
        count = len(rows)
        if count == 0:
            return ways
        of_each = torch.empty(count, dtype=torch.long, device=rows.device)
        if self.method != "auto":
            affordable = self._most(self.method, count)
            of_each[:affordable] = WAY[self.method]
        else:
            affordable = self._auto(of_each)
        of_each[affordable:] = _without_time(report, rows[affordable:], slots[affordable:])
        ways[rows, slots] = of_each
        return ways

    def _auto(self, of_each: Tensor) -> int:
        """Fills in the ways of tokens, worthiest first; how many of them there is time for."""
        count = len(of_each)
        second = next((way for way in self.ways if way in ("estimate", "restore") and self._fits({way: count})), None)
        exact = self._most("recompute", count, second) if "recompute" in self.ways else 0
        of_each[:exact] = WAY["recompute"]
        if second is not None:
            of_each[exact:] = WAY[second]
            return count
        cheaper = [way for way in self.ways if way in ("estimate", "restore")]
        if exact or not cheaper:
            return exact
        affordable = self._most(cheaper[-1], count)  # not all of them, by the quicker way
        of_each[:affordable] = WAY[cheaper[-1]]
        return affordable

    def _most(self, way: str, count: int, rest: str | None = None) -> int:
        """How many of `count` tokens can go this way where the others go the way of the `rest`."""
        low, high = 0, count
        while low < high:
            middle = (low + high + 1) // 2
            tokens = {way: middle} | ({rest: count - middle} if rest is not None else {})
            low, high = (middle, high) if self._fits(tokens) else (low, middle - 1)
        return low

    def _fits(self, tokens: dict[str, int]) -> bool:
        return self.budget is None or self.share(tokens) <= self.budget

    def share(self, tokens: dict[str, int]) -> float:
        """Expected time of repairing so many tokens each way, as a share of a prefill; needs a budget."""
        assert self.costs is not None  # measured for a budget
        taken = sum(self.costs.seconds(way, count, self.length) for way, count in tokens.items())
        return taken / self.costs.prefill(self.tokens, self.length)


def _by_worth(changed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and slots of the damaged tokens: the first positions, which every token attends to, then the latest ones."""
    rows, slots = changed.nonzero(as_tuple=True)
    place = positions[rows, slots]
    order = torch.where(place < SINKS, place - SINKS, torch.iinfo(torch.int32).max - place).argsort(stable=True)
    return rows[order], slots[order]


def _without_time(report: CheckReport, rows: Tensor, slots: Tensor) -> Tensor:
    """What is done with tokens [n] that there is no time for: the mildly damaged are left, all others erased."""
    damaged = report.parts[rows, slots].flatten(1).float().mean(1)
    finite = report.kind_numbers[rows, slots] != NUMBER["not finite"]
    return torch.where((damaged < MILD) & finite, WAY["leave"], WAY["erase"])
