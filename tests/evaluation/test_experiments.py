"""Summaries of a grid, and a grid that goes on after an interrupt."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import tiny

from cachemedic.core.severity_map import MAP_COLUMNS, SeverityMap
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.heuristics import NoDefense, Reset
from cachemedic.evaluation import experiments
from cachemedic.models.load import Base
from cachemedic.studies import summaries


def grid_of(readers: dict[str, float], seeds: int = 5) -> pd.DataFrame:
    """A grid in which damage is severity nats and a reader leaves the given share of it."""
    rng = np.random.default_rng(0)
    rows = []
    clean_nll = rng.normal(2.0, 0.1, seeds)
    for seed, (reader, left) in itertools.product(range(seeds), readers.items()):
        for kind, s in [("none", 0.0), *itertools.product(("gaussian", "quant_noise"), (0.5, 1.0))]:
            nll = clean_nll[seed] + left * s
            rows.append(("perplexity", kind, s, reader, seed, s, 1.0, nll, clean_nll[seed], left * s, np.nan, 8))
    columns = [*experiments.ID_COLUMNS, "parameter", "share", "nll", "nll_clean", "kl", "accuracy", "n_examples"]
    return pd.DataFrame(rows, columns=columns)


def test_recovery_is_the_share_of_the_damage_undone():
    grid = grid_of({"none": 1.0, "half": 0.5, "perfect": 0.0, "harmful": 1.5})
    summary = summaries.summary(grid).set_index("reader")
    for reader, expected in (("none", 0.0), ("half", 0.5), ("perfect", 1.0), ("harmful", -0.5)):
        assert summary.loc[reader, "recovery"] == pytest.approx(expected)
        assert summary.loc[reader, "kl_recovery"] == pytest.approx(expected)
        assert summary.loc[reader, "clean_regression"] == pytest.approx(0.0, abs=1e-12)
    assert summary.loc["none", "auc_gain"] == 0.0
    assert summary.loc["perfect", "auc_gain"] > summary.loc["half", "auc_gain"] > 0 > summary.loc["harmful", "auc_gain"]
    by_type = summaries.recovery_by_type(grid_of({"none": 1.0, "half": 0.5}))
    assert by_type[by_type.reader == "half"]["recovery"].tolist() == pytest.approx([0.5, 0.5])


def test_auc_of_a_perfect_reader_is_its_clean_score():
    grid = grid_of({"none": 1.0, "perfect": 0.0})
    auc = summaries.robustness(grid)
    perfect = auc[auc.reader == "perfect"].groupby("seed")["auc"].first()
    clean = np.exp(-grid[(grid.type == "none") & (grid.reader == "perfect")].set_index("seed")["nll"])
    assert perfect.to_numpy() == pytest.approx(clean.to_numpy())


def test_intervals_count_seeds_and_examples():
    rows = summaries.intervals(grid_of({"none": 1.0}))
    assert (rows.n_seeds == 5).all()
    assert (rows.n_examples == 40).all()
    assert (rows.nll_low <= rows.nll).all()
    assert (rows.nll <= rows.nll_high).all()


def test_an_interrupted_grid_goes_on_and_gives_the_same_rows(tmp_path, monkeypatch):
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    shape = model.config.num_hidden_layers, model.config.num_attention_heads
    rows = [("tiny", *shape, "gaussian", s, 4 * s, 1.0, 1.0) for s in (0.1, 0.25, 0.5, 1.0)]
    base = Base(model, tokenizer, "tiny", SeverityMap(pd.DataFrame(rows, columns=MAP_COLUMNS)))
    tasks = {"perplexity": perplexity_task(tokenizer, tiny.DOCUMENTS, (0, 1), n=3, prefix=12, scored=4)}
    readers = {"none": NoDefense(), "reset": Reset()}

    def grid(folder):
        return experiments.run_grid(base, tasks, readers, folder, types=("gaussian",), severities=(0.5, 1.0))

    whole = grid(None)
    evaluate, calls = experiments.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(experiments, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid(tmp_path)
    pd.testing.assert_frame_equal(grid(tmp_path), whole)
    assert len(calls) == 4  # two before the interrupt, the one that it hit twice


def test_advantage_is_over_the_reference_and_paired():
    grid = grid_of({"none": 1.0, "half": 0.5, "most": 0.2})
    rows = summaries.advantage(grid, "half").set_index("reader")
    assert rows.loc["half", "kl_advantage"] == 0
    assert rows.loc["most", ["nll_advantage", "kl_advantage"]].tolist() == pytest.approx([0.3, 0.3])
    assert rows.loc["most", "nll_advantage_high"] == pytest.approx(0.3)  # paired: seeds do not differ in it
    assert rows.loc["none", "nll_advantage"] == pytest.approx(-0.5)


def test_means_over_seeds_count_a_seed_once():
    rows = pd.DataFrame({"kind": ["x"] * 4, "seed": [0, 0, 0, 1], "rho": [1.0, 1.0, 1.0, 2.0]})
    (mean,) = summaries.means_over_seeds(rows, ["kind"], ["rho"]).itertuples()
    assert (mean.rho, mean.n_seeds) == (1.5, 2)
    assert mean.rho_low < 1 < 2 < mean.rho_high


def test_rows_come_in_the_order_asked_for():
    rows = pd.DataFrame({"name": ["b", "c", "a", "b"], "i": range(4)})
    assert summaries.in_order(rows, "name", "abc")["i"].tolist() == [2, 0, 3, 1]
    assert summaries.summary(grid_of({"none": 1.0}))["n_examples"].tolist() == [40]
