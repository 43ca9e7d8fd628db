"""The figure and the tables of notebook 24."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import head_of, numbered_label, reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors
from cachemedic.studies.drawing.tables import brackets


def figure(rows: pd.DataFrame, flips: pd.DataFrame) -> Figure:
    """Left, KL left against the bytes kept of a token: `rivals_results`; right, against the rate of raw bit flips:
    `rivals_flips`. Readers that differ in a number alone are one line; grey: no defence.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(1.15 * TEXT_WIDTH, 4.4), width_ratios=(3, 2))
    shown = rows[rows["reader"] != "none"]
    lines = shown.groupby(shown["reader"].map(head_of), sort=False)
    for (_, part), style in zip(lines, reader_styles([name for name, _ in lines]).values(), strict=True):
        part = part.sort_values("share")
        dashes = {} if len(part) > 1 else {"linestyle": "none"}
        left.errorbar(part["share"], part["kl"], errors(part, "kl"), **style | dashes)
    left.axhline(rows.loc[rows["reader"] == "none", "kl"].iloc[0], color="0.6", linewidth=0.8, zorder=0)
    left.set_xscale("symlog", linthresh=1e-3, linscale=0.4)
    left.set(xlabel="bytes kept of a token, share of a bf16 cache", ylabel="KL left, nats per token", xlim=(-1e-4, 2))
    rates = flips.groupby(flips["reader"].map(head_of), sort=False)
    for (reader, part), style in zip(rates, reader_styles([name for name, _ in rates]).values(), strict=True):
        look = style | ({"color": "0.6", "marker": None} if reader == "none" else {})
        right.errorbar(part["rate"], part["kl"], errors(part, "kl"), **look)
    right.set_xscale("log")
    right.set(xlabel="flipped share of all stored bits")
    for ax in (left, right):
        _kl_axis(ax)
    found = {text: handle for ax in (left, right) for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def _kl_axis(ax: Axes) -> None:
    ax.set_yscale("symlog", linthresh=1e-4, linscale=0.4)
    ax.set_ylim(-2e-5, 20)


def main_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `rivals_results`: what each reader leaves, beside E, and what it keeps and takes."""
    return pd.DataFrame(
        {
            "reader": rows["reader"].map(numbered_label) + rows["best_heuristic"].map({True: " *", False: ""}),
            "KL left": brackets(rows, "kl"),
            "more than E": brackets(rows, "more"),
            "bytes a token": (rows["bits_per_token"] / 8).round().astype(int),
            "%": 100 * rows["share"],
            "once, MB": rows["fixed_bytes"] / 1e6,
            "prefill": rows["prefill_share"],
        }
    )


def flips_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `rivals_flips`, a column for each rate; a nat and more with one digit behind the point."""
    cells = brackets(rows, "kl").where(rows["kl"] < 1, brackets(rows, "kl", 1))
    named = rows.assign(reader=rows["reader"].map(numbered_label), kl=cells)
    table = named.pivot_table(index="reader", columns="rate", values="kl", aggfunc="first", sort=False)
    return table.rename(columns=lambda rate: f"{rate:.0e}").reset_index().rename_axis(columns=None)
