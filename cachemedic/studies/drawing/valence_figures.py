"""The figures of valence-weighted distillation."""

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


def gate(checks: pd.DataFrame, threshold: float) -> Figure:
    """Projected over teacher's valence at every check, a panel per gate, a line per seed (`gate_log`)."""
    gates = list(checks["gate"].unique())
    figure, axes = plt.subplots(1, len(gates), figsize=(TEXT_WIDTH, 2.4), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], gates, strict=True):
        part = checks[checks["gate"] == name]
        for seed, style in line_styles([str(s) for s in part["seed"].unique()]).items():
            own = part[part["seed"] == int(seed)]
            ratio = own["projected"] / own["baseline"]
            ax.plot(own["step"], ratio, **style | {"markersize": 3}, label=f"seed {seed}")
            ax.plot(own["step"][own["blocked"]], ratio[own["blocked"]], "rx")
        ax.axhline(threshold, color="0.7", linewidth=0.8, zorder=0)
        ax.set(title=name, xlabel="update")
    axes[0, 0].set_ylabel("projected / teacher's valence")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure
