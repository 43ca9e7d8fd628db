"""Timing by interleaved repetitions: what competes is measured in turn, and compared within one turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import pandas as pd
import scipy.stats

from cachemedic.core.progress import tqdm
from cachemedic.evaluation.statistics import LEVEL, Interval


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int, what: str) -> pd.DataFrame:
    """Times of all contenders, one row a round and one column each.

    A contender does its work once, times it itself, so that preparation stays out, and returns the time. Every other
    round goes backwards, so that a machine that slows down favours nobody. A round before the first warms up.
    """
    times = []
    for turn in tqdm(range(-1, rounds), desc=what):
        order = list(contenders) if turn % 2 else list(contenders)[::-1]
        measured = {name: contenders[name]() for name in order}
        if turn >= 0:
            times.append(measured)
    return pd.DataFrame(times, columns=list(contenders))


def median_ratio(numerator: pd.Series, denominator: pd.Series) -> Interval:
    """The median over rounds of the ratio within a round, with its distribution-free interval (order statistics).

    Fewer than six rounds bound no median at this level: the limits are then NaN.
    """
    ratios = numerator / denominator
    bounds = scipy.stats.quantile_test(ratios, q=ratios.median(), p=0.5).confidence_interval(LEVEL)
    return Interval(float(ratios.median()), float(bounds.low), float(bounds.high))


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A contender of `interleave`: the work, timed."""

    def contender() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return contender


def row(operation: str, length: int, layers: int, times: pd.DataFrame, name: str, reference: str) -> dict[str, object]:
    """One line of a table: the times of a contender over those of its reference."""
    ratio = median_ratio(times[name], times[reference])
    return {
        "operation": operation,
        "positions": length,
        "layers": layers,
        "milliseconds": 1e3 * times[name].median(),
        "reference": reference,
        "reference_milliseconds": 1e3 * times[reference].median(),
        "ratio": ratio.estimate,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "rounds": len(times),
    }
