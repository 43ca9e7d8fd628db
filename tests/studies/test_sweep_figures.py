"""Figures of sweeps show what their frames hold, in the order of their rows."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cachemedic.studies.drawing import sweep_figures


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def with_bounds(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    return rows.assign(**{f"{n}_{side}": rows[n] + d for n in names for side, d in (("low", -0.1), ("high", 0.1))})


def frame(names: str, *values: object) -> pd.DataFrame:
    rows = pd.DataFrame(itertools.product(*values), columns=names.split())
    return rows.assign(x=np.arange(len(rows)) / 10, y=1.0)


def bars(ax) -> list[list[float]]:
    """The ends of all horizontal error bars of an axis."""
    return [segment[:, 0].tolist() for c in ax.containers for segment in c[2][0].get_segments()]


def test_a_forest_has_a_row_for_each_label_and_an_interval_for_each_dot():
    rows = with_bounds(frame("type reader", ["gaussian", "quant_noise"], ["b", "a"]), "x", "y")
    figure = sweep_figures.forest(rows, "type", {"x": "share", "y": "cost"}, group="reader")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["gaussian", "quant noise"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a"]
    assert np.allclose(bars(left), [[-0.1, 0.1], [0.1, 0.3], [0.0, 0.2], [0.2, 0.4]])  # b, b, a, a
    assert right.get_xlabel() == "cost"


def test_contraction_shows_conditions_and_bounds_of_every_type():
    types = [*"uvwxyz"]
    rows = frame("type severity condition", types, [0.5, 1.0], ["on", "off"]).rename(columns={"x": "rho"})
    rows = with_bounds(rows.assign(**dict.fromkeys(sweep_figures.REFERENCES, 0.9)), "rho")
    figure = sweep_figures.contraction(rows, ["off", "on"])
    assert [ax.get_title() for ax in figure.axes] == types
    assert len(figure.legends[0].get_texts()) == 2 + len(sweep_figures.REFERENCES)
    drawn = figure.axes[0].containers[0][0].get_ydata()
    assert drawn.tolist() == rows[(rows.type == "u") & (rows.condition == "off")].rho.tolist()


def test_protected_layers_has_a_row_of_panels_for_each_fault_setting():
    rows = with_bounds(frame("hit place size", ["all", "protected"], ["early", "late"], [2, 4]), "x")
    figure = sweep_figures.protected_layers(rows, {"x": "share"})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["faults on all layers", "faults on protected layers"]
    assert figure.axes[1].containers[1][0].get_ydata().tolist() == pytest.approx([0.6, 0.7])


def test_stability_figures_hold_curves_and_maps():
    rows = with_bounds(frame("reader noise", ["none", "A"], [0.0, 0.1, 1.0]), "x", "y")
    rows = rows.rename(columns=lambda name: name.replace("y", "distance").replace("x", "sensitivity"))
    left, right = sweep_figures.sensitivity(rows).axes
    assert left.containers[1][0].get_ydata().tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert right.containers[0][0].get_ydata().tolist() == [1, 1, 1]
    maps = frame("reader layer head", ["none", "A"], [0, 1, 2], [0, 1]).rename(columns={"x": "gamma"})
    maps["gamma"] += 0.1
    axes = sweep_figures.amplification_maps(maps).axes
    doublings = axes[3].images[0].get_array()
    assert doublings[1, 2] == pytest.approx(np.log2(1.2 / 0.6))  # head 1 of layer 2
    assert axes[3].get_title() == "over no defence"


def test_overhead_figures_name_every_reader():
    rows = frame("reader positions", ["masking", "operator A"], [32, 64]).rename(columns={"x": "ratio"})
    rows["kind"] = np.where(rows.reader == "masking", "defence", "operator")
    rows = with_bounds(rows.assign(ratio=rows.ratio + 1, peak_mebibytes=2.0, clean_regression=0.5), "ratio")
    figure = sweep_figures.overhead(rows)
    assert [part.legends[0].get_texts()[0].get_text() for part in figure.subfigs] == [
        "masking",
        "A, linear",
    ]
    longest = with_bounds(rows[rows.positions == 64], "clean_regression")
    longest["recovery"] = np.where(longest.reader == "masking", np.nan, 0.9)
    time, cost, recovery = sweep_figures.pareto(with_bounds(longest[::-1], "recovery"), 64).axes
    assert [label.get_text() for label in time.get_yticklabels()] == ["masking", "A, linear"], "the quickest first"
    for ax, dots in ((time, [10, 30]), (cost, [0.5, 0.5]), (recovery, [np.nan, 0.9])):  # masking's is not measured
        assert ax.containers[0][0].get_xdata().astype(float) == pytest.approx(dots, nan_ok=True)
