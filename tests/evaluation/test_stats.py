"""Intervals against scipy, and a simulation of what they cover with five seeds."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from cachemedic.evaluation.statistics import (
    best_heuristic,
    paired_interval,
    ratio_interval,
    recovery,
    robustness_auc,
    t_interval,
)

FINITE = st.floats(-1e3, 1e3)


@given(st.lists(FINITE, min_size=2, max_size=8))
def test_t_interval_is_scipys(values) -> None:
    interval = t_interval(values)
    assert interval.estimate == pytest.approx(np.mean(values), abs=1e-9)
    scale = scipy.stats.sem(values)
    if scale > 1e-9:
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scale)
        assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


def test_one_seed_has_no_interval() -> None:
    interval = t_interval([2.0])
    assert interval.estimate == 2.0
    assert np.isnan([interval.low, interval.high]).all()


def test_paired_interval_is_that_of_the_differences() -> None:
    values, reference = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 3.5])
    assert paired_interval(values, reference) == t_interval(values - reference)


def test_ratio_interval_is_exact_where_the_ratio_is_constant() -> None:
    damage = np.array([0.5, 1.0, 2.0])
    interval = ratio_interval(0.25 * damage, damage)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))
    assert ratio_interval([1.0, 3.0], [4.0, 4.0]).estimate == 0.5


def test_with_five_seeds_the_t_interval_covers() -> None:
    """The reason why headline numbers carry t intervals. True mean 0; seeds differ more than examples average out."""
    rng, trials = np.random.default_rng(0), 600
    covered = {"t": 0, "ratio": 0}
    for _ in range(trials):
        values = rng.normal(size=(5, 1)) + rng.normal(size=(5, 16))
        by_seed = values.mean(1)
        damage = 4 + 0.5 * rng.normal(size=5)
        intervals = {
            "t": t_interval(by_seed),
            "ratio": ratio_interval(0.5 * damage + by_seed, damage),
        }
        for name, interval in intervals.items():
            covered[name] += interval.low <= (0.5 if name == "ratio" else 0.0) <= interval.high
    shares = {name: count / trials for name, count in covered.items()}
    assert shares["t"] == pytest.approx(0.95, abs=0.025)
    assert shares["ratio"] == pytest.approx(0.95, abs=0.025)


@given(st.floats(-5, 5), st.lists(st.floats(0.05, 1), min_size=1, max_size=6))
def test_auc_of_a_constant_score_is_that_score(value, steps) -> None:
    severities = np.cumsum([0.0, *steps])
    assert robustness_auc(severities, [value] * len(severities)) == pytest.approx(value)


def test_auc_is_the_trapezoid_over_the_reached_range() -> None:
    assert robustness_auc([0, 0.1, 0.5], [1.0, 0.8, 0.0]) == pytest.approx((0.9 * 0.1 + 0.4 * 0.4) / 0.5)


def test_recovery_is_a_ratio_of_means() -> None:
    clean, corrupted = [1.0, 1.0], [2.0, 4.0]
    assert recovery(clean, corrupted, clean) == 1.0
    assert recovery(clean, corrupted, corrupted) == 0.0
    assert recovery(clean, corrupted, [2.0, 2.0]) == pytest.approx(0.5)
    assert np.isnan(recovery(clean, clean, clean))


def test_best_heuristic_has_the_highest_mean_auc() -> None:
    rows = [("reset", 0.2), ("reset", 0.9), ("smoothing", 0.6), ("smoothing", 0.7)]
    assert best_heuristic(pd.DataFrame(rows, columns=["reader", "auc"])) == "smoothing"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_interval([]), "at least one"),
        (lambda: t_interval([1.0, float("nan")]), "must be finite"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), "got 1 and 2"),
        (lambda: ratio_interval([1.0, 1.0], [1.0, -1.0]), "mean zero"),
        (lambda: robustness_auc([0.0], [1.0]), "at least two increasing severities"),
        (lambda: robustness_auc([0.0, 0.5, 0.5], [1.0, 1.0, 1.0]), "at least two increasing severities"),
    ],
)
def test_bad_input_is_one_clear_error(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
