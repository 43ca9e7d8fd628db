"""Summaries of an experiment and their intervals over few seeds.

The interval of a headline number is a t interval over seeds: with five of them it covers its level, which a percentile
bootstrap does not (about 84% instead of 95%). See Agarwal et al. 2021 on few-seed reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A point estimate with the limits of its confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def columns(self, name: str) -> dict[str, float]:
        """The three columns of a table that hold it: `name`, `name`_low and `name`_high."""
        return {name: self.estimate, f"{name}_low": self.low, f"{name}_high": self.high}


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of independent `values` [S], one per seed, with Student's t interval.

    A single value has no interval: its limits are NaN. Raises `ValueError` for none.
    """
    x = _finite(values)
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, float("nan"), float("nan"))
    margin = scipy.stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(mean, mean - float(margin), mean + float(margin))


def paired_interval(values: Sequence[float], reference: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean difference `values` - `reference`, both [S] over the same seeds."""
    x, y = _finite(values), _finite(reference)
    if x.shape != y.shape:
        raise ValueError(f"paired values need as many references: got {len(x)} and {len(y)}")
    return t_interval(x - y, level)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], level: float = LEVEL) -> Interval:
    """The ratio of the means of two paired samples [S], such as recovery: damage undone over damage done.

    A t interval of the linearised ratio (delta method). Raises `ValueError` if the denominators have mean zero.
    """
    a, b = _finite(numerators), _finite(denominators)
    if a.shape != b.shape:
        raise ValueError(f"a ratio of means needs paired values: got {len(a)} and {len(b)}")
    if b.mean() == 0:
        raise ValueError("the denominators have mean zero: without damage there is no recovery")
    ratio = a.mean() / b.mean()
    return t_interval(ratio + (a - ratio * b) / b.mean(), level)


def robustness_auc(severities: Sequence[float], scores: Sequence[float]) -> float:
    """Area under the score over severity (trapezoid), divided by the range of severities: the mean score over it.

    Raises `ValueError` unless there are at least two increasing severities, with a score for each.
    """
    s, y = _finite(severities), _finite(scores)
    if s.shape != y.shape or len(s) < 2 or (np.diff(s) <= 0).any():
        raise ValueError(f"an AUC needs at least two increasing severities with a score each, got {s} and {y}")
    return float(np.trapezoid(y, s) / (s[-1] - s[0]))


def recovery(nll_clean: Sequence[float], nll_corrupted: Sequence[float], nll_repaired: Sequence[float]) -> float:
    """The share of the damage that is undone, (corrupted - repaired) / (corrupted - clean): a ratio of means.

    NaN where there is no damage.
    """
    clean, corrupted, repaired = (float(np.mean(x)) for x in (nll_clean, nll_corrupted, nll_repaired))
    return (corrupted - repaired) / (corrupted - clean) if corrupted != clean else float("nan")


def best_heuristic(validation: pd.DataFrame) -> str:
    """The reader with the highest mean AUC, from validation rows with columns reader and auc (of any type and seed).

    The rule is fixed before the test split is looked at; among equals the first by name wins.
    """
    return str(validation.groupby("reader")["auc"].mean().idxmax())


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, float)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"values must be finite and at least one, got {x}")
    return x
