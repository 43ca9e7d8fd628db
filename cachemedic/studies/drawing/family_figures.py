"""The figures of operator families and of real faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import reader_styles
from cachemedic.studies.drawing.style import COLOURS, MARKERS, TEXT_WIDTH, errors, mark_beyond


def recovery_by_type(rows: pd.DataFrame, readers: Sequence[str], types: Sequence[str]) -> Figure:
    """Recovery of the lost NLL, a panel per base, a row per type: rows of `summaries.recovery_by_type` with `base`.

    The axis ends at -0.5 and 1.1; means beyond are arrows with the number.
    """
    styles, bases = reader_styles(readers), list(rows["base"].unique())
    figure, axes = plt.subplots(1, len(bases), figsize=(TEXT_WIDTH, 3.9), sharey=True, sharex=True, squeeze=False)
    for ax, base in zip(axes[0], bases, strict=True):
        ax.set_xlim(-0.5, 1.1)
        for i, reader in enumerate(readers):
            own = rows[(rows["base"] == base) & (rows["reader"] == reader)].set_index("type").reindex(types)
            places = [y + 0.7 * (i / max(len(readers) - 1, 1) - 0.5) for y in range(len(types))]
            style = styles[reader] | {"linestyle": "none"}
            ax.errorbar(own["recovery"], places, xerr=errors(own, "recovery"), **style)
            mark_beyond(ax, own["recovery"], places, style["color"])
        ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.axvline(1, color="0.6", linewidth=0.8, zorder=0)
        for y in range(len(types) - 1):
            ax.axhline(y + 0.5, color="0.9", linewidth=0.6, zorder=0)
        ax.grid(axis="y", visible=False)
        ax.set(title=base.removeprefix("embedded-"), xlabel="recovered share of the lost NLL")
    axes[0, 0].set_yticks(range(len(types)), [kind.replace("_", " ") for kind in types])
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def pareto(
    rows: pd.DataFrame, lines: Mapping[str, tuple[str, Sequence[str]]], axis: str, label: str, score: str
) -> Figure:
    """A mean `score` of readers against what they cost (column `axis`, drawn on a scale that has a zero).

    A panel per base; lines: by the reader whose colour and marker it has, the name of a line and the readers that it
    joins. All others are points. The axis ends at -0.6 and 1.12; means beyond are arrows with the number.
    """
    bases = list(rows["base"].unique())
    figure, axes = plt.subplots(1, len(bases), figsize=(TEXT_WIDTH, 3.6), sharey=True, sharex=True, squeeze=False)
    for ax, base in zip(axes[0], bases, strict=True):
        own = rows[rows["base"] == base].set_index("reader")
        ax.set_xscale("symlog", linthresh=0.002, linscale=0.4)
        ax.set(title=base.removeprefix("embedded-"), xlabel=label, ylim=(-0.6, 1.12), xlim=(-0.0004, 0.5))
        others = [name for name in own.index if not any(name in names for _, names in lines.values())]
        for (line, names), style in zip(lines.values(), reader_styles(list(lines)).values(), strict=True):
            part = own.reindex(names).dropna(subset=[score]).sort_values(axis)
            ax.errorbar(part[axis], part[score], errors(part, score), **style | {"label": line, "linestyle": "-"})
        for name, style in reader_styles(others).items():
            x, y = own.loc[[name], axis], own.loc[[name], score]
            ax.plot(x, y, **style | {"linestyle": "none"})
            mark_beyond(ax, x, y, style["color"])
        ax.axhline(1, color="0.6", linewidth=0.8, zorder=0)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes[0, 0].set_ylabel("recovered share of the lost NLL")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def rate_distortion(rows: pd.DataFrame) -> Figure:
    """Codes beside the Gaussian curves (`family_evaluation.rate_distortion` with `base`): a panel per base."""
    bases = list(rows["base"].unique())
    figure, axes = plt.subplots(1, len(bases), figsize=(TEXT_WIDTH, 2.9), sharey=True, squeeze=False)
    curves = {"by layer": ("Gaussian, each layer alone", "--"), "joint": ("Gaussian, all layers jointly", "-")}
    for ax, base in zip(axes[0], bases, strict=True):
        own = rows[rows["base"] == base]
        for kind, (label, dashes) in curves.items():
            part = own[own["kind"] == kind]
            ax.plot(part["share"], part["distortion"], dashes, color="0.4", label=label)
        part = own[~own["kind"].isin(curves)].sort_values("share")
        ax.plot(
            part["share"], part["distortion"], color=COLOURS[1], marker=MARKERS[1], label="code of E, with its prior"
        )
        ax.set(xscale="log", yscale="log", title=base.removeprefix("embedded-"), xlabel="bytes, share of a bf16 cache")
    axes[0, 0].set_ylabel("error of a lost token\n(share of variance)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def against_parameter(rows: pd.DataFrame, readers: Sequence[str], faults: Mapping[str, str], score: str) -> Figure:
    """A `score` of readers against the parameter of each fault: a row of panels per base; `faults`: axis labels."""
    styles, bases = reader_styles(readers), list(rows["base"].unique())
    size = (1.3 * TEXT_WIDTH, 2.4 * len(bases) + 0.5)
    figure, axes = plt.subplots(len(bases), len(faults), figsize=size, sharey=True, squeeze=False)
    for line, base in zip(axes, bases, strict=True):
        for ax, (fault, axis) in zip(line, faults.items(), strict=True):
            for reader in readers:
                own = rows[(rows["base"] == base) & (rows["type"] == fault) & (rows["reader"] == reader)]
                own = own.sort_values("parameter")
                ax.errorbar(own["parameter"], own[score], errors(own, score), **styles[reader])
            if "probability" in axis:
                ax.set_xscale("log")
            ax.set(title=fault.replace("_", " "), xlabel=axis)
        line[0].set(ylabel=f"{base.removeprefix('embedded-')}\nKL to clean, nats per token")
        line[0].set_yscale("symlog", linthresh=1e-3)
        line[0].set_ylim(0, 20)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
