"""The figure and the tables of valence on a pretrained model."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import reader_label, reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors
from cachemedic.studies.drawing.tables import brackets

SOUND = "none"  # the type of a sound cache


def by_type(gaps: pd.DataFrame, named: pd.DataFrame) -> Figure:
    """Of every reader by type: |v_S - v_T|, and the share of reviews whose mood the prompted model names.

    gaps, named: `pretrained_valence_by_type`, `pretrained_valence_sentiment`; the line: sound caches.
    """
    kinds = [kind for kind in gaps["type"].unique() if kind != SOUND]
    readers = list(gaps["reader"].unique())
    styles = reader_styles(readers)
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 3.4), sharey=True)
    for ax, rows, name in ((left, gaps, "gap"), (right, named, "accuracy")):
        for i, reader in enumerate(readers):
            own = rows[rows["reader"] == reader].set_index("type").reindex(kinds)
            places = [y + 0.7 * (i / max(len(readers) - 1, 1) - 0.5) for y in range(len(kinds))]
            style = styles[reader] | {"linestyle": "none"}
            ax.errorbar(own[name], places, xerr=errors(own, name), **style)
        for y in range(len(kinds) - 1):
            ax.axhline(y + 0.5, color="0.9", linewidth=0.6, zorder=0)
        ax.grid(axis="y", visible=False)
    sound = named[(named["type"] == SOUND) & (named["reader"] == "none")]
    right.axvline(float(sound["accuracy"].iloc[0]), color="0.6", linewidth=0.8, zorder=0)
    left.set(xlim=(0, None), xlabel="$|v_S - v_T|$, next tokens")
    right.set(xlabel="reviews whose mood is named")
    left.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """`pretrained_valence` for a reader of the paper; the difference is to no defence, paired."""
    return pd.DataFrame({
        "reader": rows["reader"].map(reader_label),
        "bytes, %": 100 * rows["share"],
        "KL": brackets(rows, "kl"),
        "|v_S - v_T|": brackets(rows, "gap"),
        "less no defence": brackets(rows, "gap_less_none"),
        "less E": brackets(rows, "gap_less_e"),
        "projected ratio": brackets(rows, "ratio", 2),
        "shift of sentiment": brackets(rows, "shift"),
    })  # fmt: skip


def sentiment_table(rows: pd.DataFrame) -> pd.DataFrame:
    """`pretrained_valence_sentiment` for a reader of the paper: a line per reader, a column per type."""
    shown = rows.assign(accuracy=brackets(rows, "accuracy", 2), type=rows["type"].replace(SOUND, "sound cache"))
    cells = shown.pivot_table(index="reader", columns="type", values="accuracy", aggfunc="first", sort=False)
    cells = cells.rename(index=reader_label, columns=lambda kind: kind.replace("_", " "))
    return cells.rename_axis(columns=None).reset_index()
