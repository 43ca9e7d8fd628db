"""The conditions and summaries of notebook 27."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from tiny_training import tiny_base

from cachemedic.studies.computing import pretrained_stability as study
from cachemedic.studies.drawing import pretrained_stability as drawing
from cachemedic.studies.family_study import token_aware_config
from cachemedic.studies.sweeps import stacks


def test_conditions_differ_in_the_term_alone_and_train_as_one_stack() -> None:
    base = tiny_base()
    config = token_aware_config(base, "D", (0, 1), smoke=True)
    found = study.conditions(config, study.TERMS["D"])
    assert list(found)[:2] == [study.FITTED, study.FREE]
    assert found[study.FITTED].steps == 0
    sizes = sorted(len(names) for _, names in stacks(base, found))
    assert sizes == [1, len(study.TERMS["D"])]
    assert [c.objectives[0].lambda_contr for c in found.values()][1:] == [w for w, _ in study.TERMS["D"]]


def _log() -> pd.DataFrame:
    rho = {0: (0.5, 0.7), 1: (0.4, 0.5)}  # by condition, of two seeds
    rows = [
        {"run_id": f"key/seed{seed}/condition{condition}", "step": step, "rho_mean": value if step > 2 else 99.0}
        for condition, values in rho.items()
        for seed, value in zip((3, 5), values, strict=True)
        for step in range(1, study.LAST + 3)
    ]
    return pd.DataFrame(rows)


def test_the_ratio_of_contraction_is_that_of_the_last_updates() -> None:
    found = study.contraction(_log(), ["free", "term"]).set_index("reader")
    assert found.loc["free", "rho"] == pytest.approx(0.6)
    assert found.loc["term", "rho"] == pytest.approx(0.45)
    assert found.loc["term", "rho_less"] == pytest.approx(-0.15)
    assert found.loc["free", "rho_less"] == 0


def _grid(recovered: dict[str, float], kinds: tuple[str, ...], severities: tuple[float, ...]) -> pd.DataFrame:
    rows = []
    for reader, share in recovered.items():
        for seed in (0, 1):
            common = {
                "task": "perplexity",
                "reader": reader,
                "seed": seed,
                "n_examples": 2,
                "nll_clean": 3.0,
                "accuracy": 0.0,
            }
            rows.append(common | {"type": "none", "severity": 0.0, "nll": 3.0, "kl": 0.0})
            for kind in kinds:
                for severity in severities:
                    left = (1 - share) * severity * (1 + seed)
                    rows.append(common | {"type": kind, "severity": severity, "nll": 3 + left, "kl": left})
    return pd.DataFrame(rows)


def test_what_a_term_adds_is_a_share_of_the_damage() -> None:
    shares = {"none": 0.0, study.FITTED: 0.5, study.FREE: 0.6, "lambda 0.5, alpha 0": 0.9}
    ratios = pd.DataFrame({"reader": [study.FREE], "rho": [0.4]})
    found = study.compared(_grid(shares, ("gaussian",), study.SEVERITIES), ratios).set_index("reader")
    assert found.loc["lambda 0.5, alpha 0", "more_than_free"] == pytest.approx(0.3)
    assert found.loc["lambda 0.5, alpha 0", "more_than_fitted"] == pytest.approx(0.4)
    assert found.loc[study.FREE, ["more_than_free", "more_than_free_low"]].tolist() == [0, 0]
    assert found["mild_recovery"].to_dict() == pytest.approx(shares)
    assert found.loc[study.FREE, "rho"] == 0.4
    assert found.drop(study.FREE)["rho"].isna().all()


def test_a_type_that_was_left_out_is_compared_with_the_fit_to_all() -> None:
    rows = _grid({"none": 0.0, study.FITTED: 0.8, study.FREE: 0.1}, ("gaussian", "quant_noise"), (0.5,))
    held = [_grid({study.LEFT_OUT: share}, (kind,), (0.5,)).assign(held_out=kind) for kind, share in
            (("gaussian", 0.3), ("quant_noise", 0.7))]  # fmt: skip
    found = study.transfer(rows, pd.concat(held, ignore_index=True)).set_index(["held_out", "reader"])
    assert list(found.index) == [(k, r) for k in ("gaussian", "quant_noise") for r in (study.FITTED, study.LEFT_OUT)]
    assert found.loc[("gaussian", study.LEFT_OUT), "kl_recovery"] == pytest.approx(0.3)
    assert found.loc[("gaussian", study.LEFT_OUT), "more_than_fitted"] == pytest.approx(-0.5)
    assert found.loc[("quant_noise", study.LEFT_OUT), "more_than_fitted"] == pytest.approx(-0.1)
    assert found.loc[("quant_noise", study.FITTED), "kl_recovery"] == pytest.approx(0.8)


def test_the_figure_shows_terms_that_differ_and_types_with_and_without_them() -> None:
    shares = {"none": 0.0, study.FITTED: 0.5, study.FREE: 0.6, "lambda 0.5, alpha 0": 0.9}
    ratios = pd.DataFrame({"reader": [study.FREE], "rho": 0.4, "rho_low": 0.3, "rho_high": 0.5})
    found = study.compared(_grid(shares, ("gaussian",), study.SEVERITIES), ratios)
    rows = pd.concat([found.assign(family=family) for family in ("D", "E")], ignore_index=True)
    held = _grid({study.LEFT_OUT: 0.3}, ("gaussian",), (0.5,)).assign(held_out="gaussian")
    moved = study.transfer(_grid({"none": 0.0, study.FITTED: 0.8}, ("gaussian",), (0.5,)), held)
    figure = drawing.figure(rows, moved)
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "fitted only",
        r"$\lambda$ 0.5, $\alpha$ 0",
    ]
    assert [label.get_text() for label in right.get_yticklabels()] == ["gaussian"]
    assert drawing.left_out(moved)["difference"].tolist() == ["-0.500 [-0.500, -0.500]"]
    assert list(drawing.terms(rows)["rho"]) == ["--", "0.400 [0.300, 0.500]", "--"] * 2
    plt.close(figure)
