"""Figures show what their frames hold."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from cachemedic.studies.drawing.family_figures import pareto, recovery_by_type
from cachemedic.studies.drawing.quickstart import quickstart
from cachemedic.studies.drawing.style import mark_beyond


def test_quickstart_shows_every_reader_and_type() -> None:
    kinds = ["none", "gaussian", "quant_noise"]
    rows = [(kind, reader, 0.5, 0.4, 0.7) for kind in kinds for reader in ("corrupted", "repaired")]
    grid = pd.DataFrame(rows, columns=["type", "reader", "kl", "kl_low", "kl_high"])
    token = {"clean": [0.9, 0.1], "corrupted": [0.2, 0.3], "repaired": [0.4, 0.3]}
    figure = quickstart(token, ["' river'", "'.'"], "first token", grid)
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [0.9, 0.1, 0.2, 0.3, 0.4, 0.3]
    assert [label.get_text() for label in right.get_yticklabels()] == ["gaussian", "quant noise"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["clean", "corrupted", "repaired"]
    bars = right.containers[1][2][0].get_segments()  # error bars of the corrupted reader
    assert bars[0][:, 0].tolist() == pytest.approx([0.4, 0.7])
    plt.close(figure)


def test_a_dot_beyond_an_axis_is_an_arrow_with_its_number() -> None:
    figure, ax = plt.subplots()
    ax.set(xlim=(0, 1), ylim=(2, 0))
    mark_beyond(ax, [0.5, -3, 4.26, 0.2, 0.3, -3, float("nan")], [1, 0.5, 1.5, -7, 8, 9, 1], "k")
    assert [text.get_text() for text in ax.texts] == ["← -3.0", "4.3 →", "↓ -7.0", "↑ 8.0"]
    assert [text.xy for text in ax.texts] == [(0, 0.5), (1, 1.5), (0.2, 0), (0.3, 1)]
    plt.close(figure)


def test_recoveries_beyond_the_axis_are_told() -> None:
    rows = pd.DataFrame({"base": "b", "reader": ["checksum_erase", "D"], "type": "gaussian", "recovery": [-2.07, 0.9]})
    rows = rows.assign(recovery_low=rows.recovery - 0.1, recovery_high=rows.recovery + 0.1)
    figure = recovery_by_type(rows, ["checksum_erase", "D"], ["gaussian"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["← -2.1"]
    rows = rows.assign(share=[0.004, 0.0])
    figure = pareto(rows, {"D": ("D", ["D"])}, "share", "bytes", "recovery")
    assert [text.get_text() for text in figure.axes[0].texts] == ["↓ -2.1"]
    assert "checksum, erase" in [text.get_text() for text in figure.legends[0].get_texts()]
    plt.close("all")
