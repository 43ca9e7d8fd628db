"""What the valence study compares and reports."""

import numpy as np
import pandas as pd
import pytest

from cachemedic.evaluation import statistics as stats
from cachemedic.studies import valence_report
from cachemedic.studies.drawing.valence_tables import valence_table
from cachemedic.training.objective import RepairObjective


def test_conditions_differ_in_one_thing_each():
    named = valence_report.conditions(RepairObjective(), few=False)
    assert list(named)[:2] == ["canonical", "valence"]
    assert len({repr(objective) for objective in named.values()}) == len(named)
    assert valence_report.DEFAULT.features == "both"
    assert list(valence_report.conditions(RepairObjective(), few=True)) == ["canonical", *valence_report.CORE]


@pytest.fixture
def examples() -> pd.DataFrame:
    """Two readers, seeds and examples under two types, and a sound cache."""
    rng, rows = np.random.default_rng(0), []
    for kind in ("none", "gaussian", "dropout_zero"):
        for reader in ("canonical", "valence"):
            rows += [
                {"reader": reader, "seed": seed, "example": i, "type": kind, "severity": 0.5}
                | dict(zip(("kl", "gap", "projected", "projected_teacher"), rng.uniform(0.2, 1, 4), strict=True))
                | {"sentiment": rng.uniform(), "sentiment_teacher": rng.uniform()}
                for seed in (0, 1)
                for i in range(2)
            ]
    return pd.DataFrame(rows)


def test_the_summary_is_of_means_within_seeds(examples):
    measured = valence_report.per_seed(examples).assign(family="E")
    assert len(measured) == 3 * 2 * 2
    assert (measured["n_examples"] == 2).all()
    rows = valence_report.summary(measured).set_index("reader")
    damaged = examples[examples["type"] != "none"]

    def means(reader: str, column: str) -> np.ndarray:
        own = damaged[damaged["reader"] == reader]
        return np.array([own[own["seed"] == seed][column].mean() for seed in (0, 1)])

    gap = stats.t_interval(means("canonical", "gap"))
    assert rows.loc["canonical", "gap"] == pytest.approx(gap.estimate)
    assert rows.loc["canonical", "gap_high"] == pytest.approx(gap.high)
    ratio = means("canonical", "projected") / means("canonical", "projected_teacher")
    assert rows.loc["canonical", "ratio"] == pytest.approx(ratio.mean())
    less = stats.t_interval(means("canonical", "gap") - means("valence", "gap"))
    assert rows.loc["canonical", "gap_less_low"] == pytest.approx(less.low)
    assert rows.loc["valence", "gap_less_canonical"] == pytest.approx(-less.estimate)
    assert rows.loc["valence", "kl_less"] == 0
    own = damaged[damaged["reader"] == "valence"]
    moved = (own["sentiment"] - own["sentiment_teacher"]).abs().mean()
    assert rows.loc["valence", "shift"] == pytest.approx(moved)


def test_the_table_says_how_many_sequences_the_weights_leave(examples):
    rows = valence_report.summary(valence_report.per_seed(examples).assign(family="E"))
    table = valence_table(rows.assign(effective=[8.0, np.nan]))
    assert table["sequences of 8"].tolist() == ["8.00", "--"]
    assert table["trained by"].tolist() == ["canonical", "valence"]
