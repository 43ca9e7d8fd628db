"""The figure and the tables of valence on a pretrained model."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import reader_label, reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors
from cachemedic.studies.drawing.tables import brackets

SOUND = "none"  # the type of a sound cache


def by_type(rows: pd.DataFrame) -> Figure:
    """|v_S - v_T| of every reader by type: `pretrained_valence_by_type`; a panel for the mildest, one for the rest.

    A type that does not reach the greater severity is shown as hard as it goes.
    """
    rows = rows[rows["type"] != SOUND]
    least = rows["severity"].min()
    panels = [rows[rows["severity"] == least], rows[rows["severity"] > least]]
    panels = [own for own in panels if len(own)]
    kinds, readers = list(rows["type"].unique()), list(rows["reader"].unique())
    styles = reader_styles(readers)
    figure, axes = plt.subplots(1, len(panels), figsize=(TEXT_WIDTH, 3.4), sharex=True, sharey=True, squeeze=False)
    for ax, own in zip(axes[0], panels, strict=True):
        for i, reader in enumerate(readers):
            of_reader = own[own["reader"] == reader].set_index("type").reindex(kinds)
            places = [y + 0.7 * (i / max(len(readers) - 1, 1) - 0.5) for y in range(len(kinds))]
            style = styles[reader] | {"linestyle": "none"}
            ax.errorbar(of_reader["gap"], places, xerr=errors(of_reader, "gap"), **style)
        for y in range(len(kinds) - 1):
            ax.axhline(y + 0.5, color="0.9", linewidth=0.6, zorder=0)
        ax.grid(axis="y", visible=False)
        reached = sorted(own["severity"].unique())
        title = f"severity {reached[-1]:g}" + (f" (where reached, else {reached[0]:g})" if len(reached) > 1 else "")
        ax.set(xlim=(0, None), title=title, xlabel="$|v_S - v_T|$, next tokens")
    axes[0, 0].set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
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
