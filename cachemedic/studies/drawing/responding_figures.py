"""The figures of the sweeps on operators that respond: conditions of every family, and places."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors, line_styles

TITLES = {"A": "A, no contraction term", "D": "D", "E": "E"}
KINDS = ("standard", "fitted", "lambda", "rank", "K", "V")  # how conditions begin, in the order in which they are shown


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """The conditions of `responding_results` as a reader looks for them: what others are compared with comes first."""
    places = rows["condition"].str.split(" ").str[0].map(KINDS.index)
    sizes = rows["condition"].str.extract(r"rank (\d+)")[0].astype(float).fillna(0)
    keys = pd.DataFrame({"base": rows["base"], "family": rows["family"], "place": places, "size": sizes})
    order = keys.sort_values(["base", "family", "place", "size"], kind="stable").index
    return rows.loc[order].reset_index(drop=True)


def conditions(rows: pd.DataFrame, measure: str, axis: str) -> Figure:
    """A panel per family: a line per condition, a dot with its interval per base.

    rows: columns base, family, condition, `measure` and its bounds.
    """
    families, bases = list(rows["family"].unique()), list(rows["base"].unique())
    styles = line_styles(bases)
    most = rows.groupby("family")["condition"].nunique().max()
    figure, axes = plt.subplots(1, len(families), figsize=(TEXT_WIDTH, 0.9 + 0.24 * most), squeeze=False)
    for ax, family in zip(axes[0], families, strict=True):
        of_family = rows[rows["family"] == family]
        labels = list(of_family["condition"].unique())
        for i, base in enumerate(bases):
            own = of_family[of_family["base"] == base]
            places = [labels.index(x) + 0.35 * (i - (len(bases) - 1) / 2) for x in own["condition"]]
            style = styles[base] | {"linestyle": "none"}
            ax.errorbar(own[measure], places, xerr=errors(own, measure), **style, label=base)
        texts = [label.replace("lambda", r"$\lambda$").replace("alpha", r"$\alpha$") for label in labels]
        ax.set_yticks(range(len(labels)), texts, fontsize=7)
        ax.invert_yaxis()
        ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set_title(TITLES[family])
        ax.grid(axis="y", visible=False)
    axes[0, len(families) // 2].set_xlabel(axis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(bases))
    return figure


def places(rows: pd.DataFrame) -> Figure:
    """Recovered KL against the number of protected layers: a panel per place, a line per family.

    rows: columns reader (the family), place, size, kl_recovery with its bounds.
    """
    families, names = list(rows["reader"].unique()), list(rows["place"].unique())
    readers = {family: "A, no contraction" if family == "A" else family for family in families}
    styles = reader_styles(list(readers.values()))
    figure, axes = plt.subplots(1, len(names), figsize=(TEXT_WIDTH, 2.6), sharey=True, squeeze=False)
    for ax, place in zip(axes[0], names, strict=True):
        for family, reader in readers.items():
            own = rows[(rows["reader"] == family) & (rows["place"] == place)].sort_values("size")
            ax.errorbar(own["size"], own["kl_recovery"], errors(own, "kl_recovery"), **styles[reader])
        sizes = sorted(rows["size"].unique())
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set_title(f"{place} layers")
        ax.set_xlabel("layers hit and protected")
    axes[0, 0].set_ylabel("recovered share of the KL")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(families))
    return figure
