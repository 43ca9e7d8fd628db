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
ERASED = 1 / 4  # of the tokens that are read: not to read more of them does more harm than to read what is finite


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
        self.model, self.coder = cache.model, cache.coder
        self.expected_kl = {} if cache.operator is None else cache.operator.expected_kl
        self.length = len(cache.kept)
        self.tokens = int((cache.kept.positions >= 0).sum())  # of all rows
        self.ways = self._open_to(cache)
        if method != "auto" and method not in self.ways:
            raise ValueError(self.why_not[method])
        self.costs: CostModel | None = None  # measured where a budget has to be kept

    def _open_to(self, cache: RecordedCache) -> tuple[str, ...]:
        """The ways that can be taken."""
        self.why_not: dict[str, str] = {}
        try:
            check_can_recompute(cache.model, self.length)
        except ValueError as error:
            self.why_not["recompute"] = str(error)
        stored, computed = cache.numbers()[0][0], cache.model
        if stored.dtype != computed.dtype and not torch.is_autocast_enabled(stored.device.type):
            self.why_not["recompute"] = (
                f"the cache holds {stored.dtype}, but {type(computed).__name__} writes {computed.dtype}: repair it "
                "under the torch.autocast that it was written under"
            )
        if cache.coder is None:
            self.why_not["restore"] = self.why_not["estimate"] = (
                "this cache has no operator that knows clean tokens: make it with SketchCache(model, operator)"
            )
        return tuple(way for way in ("recompute", "estimate", "restore", "erase") if way not in self.why_not)

    def choose(self, report: CheckReport, record: TokenRecord) -> Tensor:
        """The number in `WAYS` [B, T] of what is done with each token.

        Tokens that were erased are computed again where all can be.
        """
        ways = torch.zeros_like(report.kind_numbers)
        ways[report.changed & ~record.valid] = WAY["erase"]
        hit = report.changed & record.valid
        if self.budget is None and self.method in ("auto", "recompute") and "recompute" in self.ways:
            hit |= record.erased & (record.positions >= 0)
        rows, slots = _by_worth(hit, record.positions)
        count = len(rows)
        if count == 0:
            return ways
        if self.budget is not None:
            self.costs = costs_of(self.model, self.coder, self.ways)
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
        most = {way: self._most(way, count) for way in self.ways if way != "erase"}  # not all of them, one way
        way = max(most, key=lambda way: most[way] * self._gain(way), default="erase")
        of_each[: most.get(way, 0)] = WAY[way]
        return most.get(way, 0)

    def _gain(self, way: str) -> float:
        """Nats that repairing a token this way saves over erasing it, in units of one where that was not measured."""
        erased = self.expected_kl.get("erase", 1.0)
        return erased - self.expected_kl.get(way, 0.0)

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
    """What is done with tokens [n] that there is no time for.

    The mildly damaged are left and others erased; where these would be too many, all are left that are finite.
    """
    damaged = report.parts[rows, slots].flatten(1).float().mean(1)
    finite = report.kind_numbers[rows, slots] != NUMBER["not finite"]
    mild = (damaged < MILD) & finite
    left = finite if int((~mild).sum()) > ERASED * report.read else mild
    return torch.where(left, WAY["leave"], WAY["erase"])
