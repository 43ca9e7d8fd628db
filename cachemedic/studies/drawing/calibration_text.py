"""The figure and the tables of notebook 25."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import reader_label
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors, line_styles
from cachemedic.studies.drawing.tables import brackets

CODE, ESTIMATE = "E, code alone", "E"


def figure(kl: pd.DataFrame, accuracy: pd.DataFrame) -> Figure:
    """A row a base. Left: KL of the code alone by kind of text, every token lost. Right: sentiment accuracy of E,
    hollow that of its code alone; lines: no defence, and sound caches (dotted).

    Rows of `calibration_text_kl` and `calibration_text_accuracy`.
    """
    bases = list(kl["base"].unique())
    names = [name for name in kl["calibrated"].fillna("").unique() if name]
    looks = line_styles(names)
    figure, axes = plt.subplots(
        len(bases), 2, figsize=(TEXT_WIDTH, 1.9 * len(bases) + 0.5), squeeze=False, sharex="col", width_ratios=(3, 2)
    )
    for (left, right), base in zip(axes, bases, strict=True):
        own = kl[(kl["base"] == base) & (kl["fault"] == "lost") & (kl["reader"] == CODE)]
        _by_kind(left, own, looks)
        left.set(title=base.removeprefix("embedded-"), xlim=(-0.01, None))
        of_base = accuracy[accuracy["base"] == base]
        for reader, below, fill in ((ESTIMATE, 0.0, {}), (CODE, 0.3, {"markerfacecolor": "white"})):
            repaired = of_base[of_base["reader"] == reader].set_index("calibrated").reindex(names)
            for place, name in enumerate(names):
                row = repaired.loc[[name]]
                style = looks[name] | fill | {"linestyle": "none"}
                right.errorbar(row["accuracy"], [place + below], xerr=errors(row, "accuracy"), **style)
        undefended = of_base[of_base["reader"] == "none"].iloc[0]
        right.axvline(undefended["accuracy"], color="0.5", linewidth=0.8, zorder=0)
        right.axvline(undefended["clean"], color="0.5", linewidth=0.8, linestyle=":", zorder=0)
        right.set_yticks(range(len(names)), [f"on {name}" for name in names])
        right.set_title(base.removeprefix("embedded-"))
        right.margins(y=0.25)
        right.invert_yaxis()
    axes[-1, 0].set_xlabel("KL of the code alone, every token lost, nats")
    axes[-1, 1].set_xlabel("accuracy on reviews")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title="calibrated on")
    return figure


def _by_kind(ax: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]) -> None:
    kinds = list(rows["kind"].unique())
    for i, (name, look) in enumerate(looks.items()):
        part = rows[rows["calibrated"] == name].set_index("kind").reindex(kinds)
        places = [y + 0.6 * (i / max(len(looks) - 1, 1) - 0.5) for y in range(len(kinds))]
        ax.errorbar(part["kl"], places, xerr=errors(part, "kl"), **look | {"linestyle": "none", "label": name})
    ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_yticks(range(len(kinds)), [f"of {kind}" for kind in kinds])
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()


def kl_table(rows: pd.DataFrame) -> pd.DataFrame:
    """KL by fault, reader and calibration, a column for each kind of text.

    The code alone where all is lost, and E behind noise: the code reads the same there, and E reads little else here.
    """
    rows = rows[rows["reader"].isin(["none", "erased"]) | (rows["reader"].eq(CODE) == rows["fault"].eq("lost"))]
    rows = rows[rows["reader"].ne("erased") | rows["fault"].eq("lost")]
    named = rows.assign(
        base=rows["base"].str.removeprefix("embedded-"),
        reader=rows["reader"].map(reader_label),
        kl=brackets(rows, "kl"),
    )
    keys = ["base", "fault", "reader", "calibrated"]
    table = named.assign(calibrated=named["calibrated"].fillna("")).pivot_table(
        index=keys, columns="kind", values="kl", aggfunc="first", sort=False
    )
    return table.reset_index().rename_axis(columns=None)


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Sentiment accuracy by reader and calibration."""
    return pd.DataFrame(
        {
            "base": rows["base"].str.removeprefix("embedded-"),
            "reader": rows["reader"].map(reader_label),
            "calibrated": rows["calibrated"].fillna(""),
            "accuracy": brackets(rows, "accuracy"),
            "over no defence": brackets(rows, "gain"),
            "sound caches": brackets(rows, "clean"),
        }
    )
