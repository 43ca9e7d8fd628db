"""Figures of the first notebooks, from the frames that these write as CSVs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.report import TEXT_WIDTH, line_styles


def base_models(positions: pd.DataFrame, needle: pd.DataFrame) -> Figure:
    """Loss by position, and needles found by context length and depth, of every base (`base_report.measure`)."""
    styles = line_styles(list(positions["base"].unique()))
    places = {context: 1.5 * i for i, context in enumerate(needle["context"].unique())}
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 2.8))
    for i, (name, style) in enumerate(styles.items()):
        curve = positions[positions["base"] == name]
        left.plot(curve["position"], curve["nll"], **style, label=name)
        left.plot(curve["position"], curve["nll_short"], **style | {"linestyle": ":", "markerfacecolor": "white"})
        own = needle[needle["base"] == name]
        own = own.assign(x=own["context"].map(places) + own["depth"] + 0.08 * (i - 0.5))  # side by side
        for _, cell in own[own["reader"] == "clean"].groupby("context"):
            right.errorbar(cell["x"], cell["accuracy"], _errors(cell, "accuracy", "low", "high"), **style)
        erased = own[own["reader"] == "erased"]
        right.scatter(erased["x"], erased["accuracy"], marker="x", s=14, linewidths=1, color=style["color"])
    left.set(title="read whole (filled) and short (white)", xlabel="position, tokens", ylabel="NLL, nats per token")
    right.set(title="needle found; crosses: cache erased", xlabel="context, tokens; in each, depth from 0 to 1")
    right.set(ylabel="exact match", ylim=(-0.05, 1.05))
    right.set_xticks([x + 0.5 for x in places.values()], [str(context) for context in places])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
    return figure


def quickstart(token: Mapping[str, Sequence[float]], tokens: Sequence[str], title: str, grid: pd.DataFrame) -> Figure:
    """Probabilities of the likeliest `tokens` under each reader, and the KL of each reader on held-out text.

    token: by reader ("clean", "corrupted", "repaired") the probabilities of `tokens`; grid: as `experiments.intervals`.
    """
    styles = line_styles(list(token))
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 2.9), width_ratios=(1, 1.4))
    for name, probabilities in token.items():
        left.plot(probabilities, **styles[name], label=name)
    left.set_xticks(range(len(tokens)), tokens, rotation=40, ha="right", rotation_mode="anchor")
    left.set(title=title, ylabel="probability", ylim=(0, None))
    types = [kind for kind in grid["type"].unique() if kind != "none"]
    for shift, name in ((-0.1, "corrupted"), (0.1, "repaired")):
        rows = grid[grid["reader"] == name].set_index("type").loc[types]
        places = [i + shift for i in range(len(types))]
        style = styles[name] | {"linestyle": "none"}
        right.errorbar(places, rows["kl"], _errors(rows, "kl", "kl_low", "kl_high"), **style)
    right.set_xticks(range(len(types)), types, rotation=40, ha="right", rotation_mode="anchor")
    right.set(title="held-out text", ylabel="KL, nats per token", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
    return figure


def _errors(rows: pd.DataFrame, name: str, low: str, high: str) -> list[pd.Series]:
    """The lengths of error bars below and above `name`."""
    return [rows[name] - rows[low], rows[high] - rows[name]]
