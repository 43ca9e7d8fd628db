"""Figures show what their frames hold."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from cachemedic.studies.drawing.quickstart import quickstart


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
