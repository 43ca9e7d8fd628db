"""The figures of the notebooks, from the frames that these write as CSVs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors, line_styles
from cachemedic.studies.summaries import types_of


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
            right.errorbar(cell["x"], cell["accuracy"], errors(cell, "accuracy"), **style)
        erased = own[own["reader"] == "erased"]
        right.scatter(erased["x"], erased["accuracy"], marker="x", s=14, linewidths=1, color=style["color"])
    left.set(title="read whole (filled) and short (white)", xlabel="position, tokens", ylabel="NLL, nats per token")
    right.set(title="needle found; crosses: cache erased", xlabel="context, tokens; in each, depth from 0 to 1")
    right.set(ylabel="exact match", ylim=(-0.05, 1.05))
    right.set_xticks([x + 0.5 for x in places.values()], [str(context) for context in places])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
    return figure


def damage(rows: pd.DataFrame) -> Figure:
    """Measured damage against calibrated severity: a row of panels per base, a panel per task, a line per type."""
    bases, tasks = rows["base"].unique(), rows["task"].unique()
    types = types_of(rows)
    styles = line_styles(types)
    size = (TEXT_WIDTH, 2.3 * len(bases) + 0.4)
    figure, axes = plt.subplots(len(bases), len(tasks), figsize=size, sharex=True, sharey="row", squeeze=False)
    for row, base in zip(axes, bases, strict=True):
        for ax, task in zip(row, tasks, strict=True):
            ax.plot([0, 1], [0, 1], color="0.8", zorder=0)
            for kind in types:
                part = rows[(rows["base"] == base) & (rows["task"] == task) & (rows["type"] == kind)]
                low, high = errors(part, "damage")
                bars = [[0, *low], [0, *high]]
                label = kind.replace("_", " ")
                ax.errorbar([0, *part["severity"]], [0, *part["damage"]], bars, label=label, **styles[kind])
            ax.set_title(f"{base.removeprefix('embedded-')}: {task}")
        row[0].set_ylabel("damage\n(share of context value)")
    for ax in axes[-1]:
        ax.set_xlabel("severity $s$ (calibrated)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def score_against_severity(
    curves: pd.DataFrame, readers: Sequence[str], scores: Mapping[str, str], title: str
) -> Figure:
    """The score of each reader against severity: a row of panels per task, a column per type; grey: the clean score.

    curves: `summaries.intervals` of one base and setting; scores: axis labels by task.
    """
    styles, types = reader_styles(readers), types_of(curves)
    figure, axes = plt.subplots(len(scores), len(types), figsize=(1.35 * TEXT_WIDTH, 5.4), sharex=True, sharey="row")
    for row, (task, label) in zip(axes, scores.items(), strict=True):
        of_task = curves[curves["task"] == task]
        at_rest = of_task[(of_task["type"] == "none") & (of_task["reader"] == "none")]["score"].item()
        for ax, kind in zip(row, types, strict=True):
            for reader in readers:
                part = of_task[(of_task["reader"] == reader) & of_task["type"].isin([kind, "none"])]
                part = part.sort_values("severity")
                bars = errors(part, "score")
                ax.errorbar(part["severity"], part["score"], bars, **styles[reader])
            ax.axhline(at_rest, color="0.7", linewidth=0.8, zorder=0)
        row[0].set_ylabel(f"{task}\n{label}")
    for ax, kind in zip(axes[0], types, strict=True):
        ax.set_title(kind.replace("_", "\n"))
    for ax in axes[-1]:
        ax.set_xlabel("severity $s$")
    figure.suptitle(title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(readers))
    return figure
