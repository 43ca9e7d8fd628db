"""The figures of notebooks 17 and 18."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors


def kinds(rows: pd.DataFrame) -> Figure:
    """KL of readers by kind of text: means over seeds of `pretrained_kinds`."""
    names, readers = list(rows["kind"].unique()), list(rows["reader"].unique())
    styles = reader_styles(readers)
    figure, ax = plt.subplots(figsize=(TEXT_WIDTH, 2.8))
    for i, reader in enumerate(readers):
        own = rows[rows["reader"] == reader].set_index("kind").reindex(names)
        places = [y + 0.7 * (i / max(len(readers) - 1, 1) - 0.5) for y in range(len(names))]
        style = styles[reader] | {"linestyle": "none"}
        ax.errorbar(own["kl"], places, xerr=errors(own, "kl"), **style)
    for y in range(len(names) - 1):
        ax.axhline(y + 0.5, color="0.9", linewidth=0.6, zorder=0)
    ax.grid(axis="y", visible=False)
    ax.set_xscale("symlog", linthresh=0.01, linscale=0.3)
    ax.set(xlabel="KL to the clean model, nats per token", xlim=(0, None))
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    figure.legend(loc="outside right center")
    return figure


def frontier(rows: pd.DataFrame) -> Figure:
    """KL left against time, a panel for each share of damaged tokens and each fault: `frontier_results`.

    The size of a marker tells the bytes that are kept of a token; the line is what the fault does without a defence.
    """
    faults, shares = (list(rows[name].unique()) for name in ("fault", "damaged"))
    readers = [name for name in rows["reader"].unique() if name != "none"]
    styles = reader_styles(readers)
    size = (1.15 * TEXT_WIDTH, 2.3 * len(faults) + 0.6)
    figure, axes = plt.subplots(len(faults), len(shares), figsize=size, sharex=True, sharey="row", squeeze=False)
    for line, fault in zip(axes, faults, strict=True):
        for ax, share in zip(line, shares, strict=True):
            own = rows[(rows["fault"] == fault) & (rows["damaged"] == share)].set_index("reader")
            ax.axhline(own.loc["none", "kl"], color="0.6", linewidth=0.8, zorder=0)
            for reader in readers:
                row = own.loc[[reader]]
                area = 4 + 10 * float(row["share"].iloc[0]) ** 0.5
                style = styles[reader] | {"linestyle": "none", "markersize": area}
                ax.errorbar(row["time"], row["kl"], errors(row, "kl"), errors(row, "time"), **style)
            ax.set_xscale("symlog", linthresh=0.01, linscale=0.5)
            ax.set_yscale("symlog", linthresh=1e-4, linscale=0.5)
            ax.set(xlim=(-0.002, 3), ylim=(-2e-5, 5), title=f"{fault}, {share:.0%} of tokens")
        line[0].set_ylabel("KL left, nats per token")
    for ax in axes[-1]:
        ax.set_xlabel("time, share of a prefill")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
