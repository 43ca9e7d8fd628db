"""The figures of sweeps, from the frames that their notebooks write as CSVs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from cachemedic.studies.drawing.readers import reader_label, reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors, line_styles

REFERENCES = {
    "bound_rank": ("bound at this rank, one type", "--"),
    "bound_full": ("bound at full rank, one type", ":"),
    "shared_rank": ("one map for all types and severities, this rank", "-."),
    "rank_floor": ("rank floor of isotropic noise", "-"),
}


def forest(rows: pd.DataFrame, label: str, measures: Mapping[str, str], group: str | None = None) -> Figure:
    """A line of dots with intervals for each row, named by column `label`: a panel per measure (column: axis label).

    Rows of one label that differ in `group` lie beside each other, each in its own colour and marker.
    """
    labels = list(rows[label].unique())
    groups = [None] if group is None else list(rows[group].unique())
    styles = line_styles([str(name) for name in groups])
    size = (TEXT_WIDTH, 0.9 + 0.2 * len(labels) * max(1.0, 0.8 * len(groups)))
    figure, axes = plt.subplots(1, len(measures), figsize=size, sharey=True, squeeze=False)
    for ax, (name, axis) in zip(axes[0], measures.items(), strict=True):
        for i, value in enumerate(groups):
            own = rows if group is None else rows[rows[group] == value]
            places = [labels.index(x) + 0.7 * ((i + 0.5) / len(groups) - 0.5) for x in own[label]]
            style = styles[str(value)] | {"linestyle": "none"}
            ax.errorbar(own[name], places, xerr=errors(own, name), **style, label=str(value))
        ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set_xlabel(axis)
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(labels)), [reader_label(str(x)) for x in labels])
    axes[0, 0].set_ylim(len(labels) - 0.5, -0.5)
    if group is not None:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3 if len(groups) == 3 else 2)
    return figure


def contraction(rows: pd.DataFrame, conditions: Sequence[str]) -> Figure:
    """rho of some `conditions` against severity, a panel per type, beside what linear maps can do at best (in grey).

    rows: means over seeds with columns type, severity, condition, rho and its bounds, and those of `REFERENCES`.
    """
    styles = line_styles(list(conditions))
    figure, axes = plt.subplots(2, 3, figsize=(TEXT_WIDTH, 4.4), sharex=True, sharey=True)
    for ax, kind in zip(axes.flat, rows["type"].unique(), strict=True):
        of_type = rows[rows["type"] == kind]
        for condition in conditions:
            own = of_type[of_type["condition"] == condition]
            ax.errorbar(own["severity"], own["rho"], errors(own, "rho"), **styles[condition], label=condition)
        own = of_type[of_type["condition"] == conditions[0]]
        for name, (label, dashes) in REFERENCES.items():
            width = 2.2 if name == "rank_floor" else 1.2
            shade = "0.8" if name == "rank_floor" else "0.45"
            ax.plot(own["severity"], own[name], color=shade, linestyle=dashes, linewidth=width, label=label, zorder=0)
        ax.set_title(kind.replace("_", " "))
    axes[0, 0].set_ylim(0, None)  # shared by all, so after all is drawn
    for ax in axes[-1]:
        ax.set_xlabel("severity $s$")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\rho$, error left / found")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def protected_layers(rows: pd.DataFrame, measures: Mapping[str, str]) -> Figure:
    """Measures against the number of protected layers, a line per place; rows of panels: which layers are hit.

    rows: columns hit, place, size and the measures with their bounds.
    """
    places, hits = list(rows["place"].unique()), list(rows["hit"].unique())
    styles = line_styles(places)
    figure, axes = plt.subplots(
        len(hits), len(measures), figsize=(TEXT_WIDTH, 2.1 * len(hits) + 0.4), sharex=True, sharey="col", squeeze=False
    )
    for row, hit in zip(axes, hits, strict=True):
        row[0].set_title(f"faults on {hit} layers", loc="left")
        for ax, (name, axis) in zip(row, measures.items(), strict=True):
            for i, place in enumerate(places):
                own = rows[(rows["hit"] == hit) & (rows["place"] == place)]
                x = own["size"] * 1.06 ** (i - 1)  # side by side
                ax.errorbar(x, own[name], errors(own, name), **styles[place], label=place)
            ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            ax.set_xscale("log", base=2)
            sizes = sorted(rows["size"].unique())
            ax.set_xticks(sizes, [str(size) for size in sizes])
            ax.minorticks_off()
            ax.set_ylabel(axis)
    for ax in axes[-1]:
        ax.set_xlabel("protected layers $k$")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(places))
    return figure


def sensitivity(rows: pd.DataFrame) -> Figure:
    """How far the logits move, and how far they are from the clean model's, against the norm of the noise.

    rows: means over seeds with columns reader, noise, sensitivity and distance, with their bounds.
    """
    readers = list(rows["reader"].unique())
    styles = reader_styles(readers)
    titles = {
        "sensitivity": r"$\|z(S+\delta)-z(S)\|_2$, the reader's own $z$",
        "distance": r"$\|z(S+\delta)-z_0(S)\|_2$, from the clean model",
    }
    figure, axes = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 3.0), sharey=True)
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for reader in readers:
            own = rows[rows["reader"] == reader]
            ax.errorbar(own["noise"], own[name], errors(own, name), **styles[reader])
        ax.set_xscale("symlog", linthresh=0.01, linscale=0.5)
        levels = sorted(rows["noise"].unique())
        ax.set_xticks(levels, [f"{level:g}" for level in levels])
        ax.minorticks_off()
        ax.set_yscale("symlog", linthresh=0.5)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set(title=title, xlabel="noise $n$, norm over that of the clean layer", ylim=(0, None))
    axes[0].set_ylabel("change of the top logits, logits")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def amplification_maps(rows: pd.DataFrame) -> Figure:
    """gamma of every layer and head: a map per reader, and beside each but the first, its ratio to the first.

    rows: columns reader, layer, head and gamma, one value each. Ratios beyond 16 are drawn as 16, also downwards.
    """
    readers = list(rows["reader"].unique())
    maps = {name: rows[rows["reader"] == name].pivot(index="head", columns="layer", values="gamma") for name in readers}
    first = maps[readers[0]]
    highest = max(table.to_numpy().max() for table in maps.values())
    size = (TEXT_WIDTH, 1.5 * len(readers))
    figure, axes = plt.subplots(len(readers), 2, figsize=size, sharex=True, sharey=True, squeeze=False)
    for (left, right), (name, table) in zip(axes, maps.items(), strict=True):
        image = left.imshow(table, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
        left.set_title(reader_label(name))
        left.set_ylabel("head")
        figure.colorbar(image, ax=left, label=r"$\gamma$", pad=0.01)
        if table is first:
            right.set_axis_off()
            continue
        doublings = np.log2((table / first).clip(1 / 16, 16))
        span = max(0.02, float(doublings.abs().to_numpy().max()))
        image = right.imshow(doublings, cmap="PuOr_r", vmin=-span, vmax=span, aspect="auto")
        right.set_title(f"over {reader_label(readers[0])}")
        figure.colorbar(image, ax=right, label=r"$\log_2$ ratio", pad=0.01)
    for ax in axes.flat:
        ax.grid(visible=False)
    axes[0, 0].set_yticks(range(len(first.index)), first.index)
    for ax in axes[-1]:
        ax.set_xticks(range(len(first.columns)), first.columns)
        ax.set_xlabel("layer")
    return figure


def overhead(rows: pd.DataFrame) -> Figure:
    """Time of a decoding step over the plain one, and peak memory, against the tokens in the cache.

    rows: columns reader, kind ("defence" or "operator": a row of panels each), positions, ratio with its bounds and
    peak_mebibytes.
    """
    kinds = list(rows["kind"].unique())
    figure = plt.figure(figsize=(TEXT_WIDTH, 2.6 * len(kinds)))
    positions = sorted(rows["positions"].unique())
    for part, kind in zip(figure.subfigures(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        left, right = part.subplots(1, 2)
        of_kind = rows[rows["kind"] == kind]
        for i, (reader, style) in enumerate(reader_styles(list(of_kind["reader"].unique())).items()):
            own = of_kind[of_kind["reader"] == reader]
            x = own["positions"] * 1.05 ** (i - 1)  # side by side
            left.errorbar(x, own["ratio"], errors(own, "ratio"), **style)
            right.plot(x, own["peak_mebibytes"], **style)
        left.axhline(1, color="0.6", linewidth=0.8, zorder=0)
        left.set_ylabel(f"{kind}s\ntime over plain step")
        right.set_ylabel("peak beside cache, MiB")
        for ax in (left, right):
            ax.set_xscale("log", base=2)
            if of_kind["ratio_high"].max() > 5:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter(NullFormatter())
            ax.set_xticks(positions, [str(x) for x in positions])
            ax.xaxis.set_minor_locator(NullLocator())
        if right.get_yscale() == "linear":
            right.set_ylim(0, None)
        part.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside upper center", ncols=4)
    for ax in (left, right):  # of the lowest row
        ax.set_xlabel("context, tokens in the cache")
    return figure


def pareto(rows: pd.DataFrame, positions: int) -> Figure:
    """What a decoding step behind `positions` tokens takes, clean cost, and recovery: a line of dots for each reader.

    rows: columns reader, ratio, clean_regression and recovery, with their bounds. The quickest reader is on top, so a
    reader is on the Pareto front if none above it costs less. One whose recovery is not known has no dot there.
    """
    rows = rows.sort_values("ratio")
    longer = {name.replace("ratio", "longer"): 100 * (rows[name] - 1) for name in ("ratio", "ratio_low", "ratio_high")}
    measures = {
        "longer": f"step behind {positions} tokens,\n% longer than plain",
        "clean_regression": "clean cost,\n% perplexity",
        "recovery": "recovered share\nof the lost NLL",
    }
    figure = forest(rows.assign(**longer), "reader", measures)
    for ax, linear, ticks in zip(figure.axes, (10, 0.1), ([-10, 0, 10, 1000], [-1, 0, 1, 100]), strict=False):
        ax.set_xscale("symlog", linthresh=linear)
        ax.margins(x=0.1)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xlabel(f"{ax.get_xlabel()}\n(log beyond ±{linear:g})")
    return figure
