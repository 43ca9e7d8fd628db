"""The figures of valence-weighted distillation and of the quantised cache."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.style import TEXT_WIDTH, errors, line_styles


def differences(rows: pd.DataFrame, title: str) -> Figure:
    """Share of the KL that each reader undoes, with its interval: a panel per task (`valence_report.against`)."""
    tasks = list(rows["task"].unique())
    readers = [name for name in rows["reader"].unique() if name != "none"]
    size = (TEXT_WIDTH, 0.26 * len(readers) + 1.1)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        part = rows[rows["task"] == task].set_index("reader").loc[readers]
        ax.errorbar(part["kl_recovery"], range(len(readers)), xerr=errors(part, "kl_recovery"), fmt="ko")
        ax.axvline(0, color="0.7", linewidth=0.8, zorder=0)
        ax.set(title=task, xlabel="share of the KL undone")
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(readers)), readers)
    axes[0, 0].set_ylim(len(readers) - 0.5, -0.5)
    figure.suptitle(title)
    return figure


def bits(rows: pd.DataFrame) -> Figure:
    """NLL lost to storage in few bits against bytes a token, a line per kind (`valence_report.bits_table`)."""
    figure, ax = plt.subplots(figsize=(0.7 * TEXT_WIDTH, 2.8))
    kinds = rows[rows["bits"] < rows["bits"].max()]
    kinds = kinds.assign(kind=kinds["reader"].str.partition(", ")[2])
    for i, (kind, style) in enumerate(line_styles(list(kinds["kind"].unique())).items()):
        part = kinds[kinds["kind"] == kind]
        places = part["bytes_per_token"] * (1 + 0.008 * i)  # side by side
        ax.errorbar(places, part["lost"], errors(part, "lost"), **style, label=kind)
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set(xlabel="bytes a cached token", ylabel="NLL lost, nats per token")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
