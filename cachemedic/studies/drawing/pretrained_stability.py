"""The figure and the tables of the contraction term and of faults that were left out, on a pretrained model."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cachemedic.studies.drawing.style import COLOURS, MARKERS, TEXT_WIDTH, errors
from cachemedic.studies.drawing.tables import brackets

FITTED, FREE, LEFT_OUT = "fitted only", "lambda 0, alpha 0", "left out"
NAMES = {FITTED: "fitted to all types", LEFT_OUT: "without the type"}


def trained(rows: pd.DataFrame) -> pd.DataFrame:
    """The conditions of `pretrained_stability` with a repair."""
    return rows[rows["reader"] != "none"]


def terms(rows: pd.DataFrame) -> pd.DataFrame:
    """`pretrained_stability` for a reader of the paper."""
    rows = trained(rows)
    rho = brackets(rows, "rho").where(rows["rho"].notna(), "--")
    return pd.DataFrame({
        "family": rows["family"],
        "condition": rows["reader"],
        "KL removed": brackets(rows, "kl_recovery"),
        "of mild faults": brackets(rows, "mild_recovery"),
        "more than without the term": brackets(rows, "more_than_free"),
        "more than fitted only": brackets(rows, "more_than_fitted"),
        "rho": rho,
    })  # fmt: skip


def left_out(rows: pd.DataFrame) -> pd.DataFrame:
    """`pretrained_left_out` for a reader of the paper: a line per type."""
    seen, lacking = (rows[rows["reader"] == reader].set_index("held_out") for reader in NAMES)
    return pd.DataFrame({
        "type": lacking.index.str.replace("_", " "),
        NAMES[FITTED]: brackets(seen.loc[lacking.index], "kl_recovery").to_numpy(),
        NAMES[LEFT_OUT]: brackets(lacking, "kl_recovery").to_numpy(),
        "difference": brackets(lacking, "more_than_fitted").to_numpy(),
    })  # fmt: skip


def _dots(ax: Axes, labels: list[str], rows: pd.DataFrame, name: str, at: float, place: int, label: str) -> None:
    """The column `name` of rows in the order of `labels`, shifted by `at` from their lines."""
    places = [y + at for y in range(len(labels))]
    style: dict[str, Any] = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": "none"}
    ax.errorbar(rows[name], places, xerr=errors(rows, name), **style, label=label)


def figure(rows: pd.DataFrame, held: pd.DataFrame) -> Figure:
    """Left: what each contraction term removes more than none does. Right: D on types that its fit had, or had not."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 2.9))
    rows = trained(rows)
    labels = [name for name in rows["reader"].unique() if name != FREE]
    for place, (family, own) in enumerate(rows.groupby("family", sort=False)):
        own = own.set_index("reader").reindex(labels)
        _dots(left, labels, own, "more_than_free", 0.24 * (place - 0.5), place, family)
    left.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    left.xaxis.set_major_locator(MaxNLocator(4))
    left.set_yticks(
        range(len(labels)),
        [x.replace("lambda", r"$\lambda$").replace("alpha", r"$\alpha$") for x in labels],
        fontsize=7,
    )
    left.set_xlabel("share of the KL, more than without the term")
    kinds = list(held["held_out"].unique())
    for place, (reader, label) in enumerate(NAMES.items()):
        own = held[held["reader"] == reader].set_index("held_out").reindex(kinds)
        _dots(right, kinds, own, "kl_recovery", 0.24 * (place - 0.5), place + 2, f"D, {label}")
    right.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], fontsize=7)
    right.set_xlabel("removed share of the KL")
    for ax in (left, right):
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    shown = [ax.get_legend_handles_labels() for ax in (left, right)]
    drawn.legend(
        *(left_of + right_of for left_of, right_of in zip(*shown, strict=True)), loc="outside lower center", ncols=4
    )
    return drawn
