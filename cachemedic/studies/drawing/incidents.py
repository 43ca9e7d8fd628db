"""The figure and the tables of notebook 16, from its CSV."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import reader_label
from cachemedic.studies.drawing.style import TEXT_WIDTH
from cachemedic.studies.drawing.tables import brackets

INCIDENTS = {
    "overwritten_prefix": "overwritten shared prefix",
    "rejected_drafts": "rejected draft tokens",
    "transfer_cut_zero": "transfer cut off, rest zero",
    "transfer_cut_old": "transfer cut off, rest old",
    "permuted_heads": "heads permuted",
    "wrong_positions": "wrong position offset",
    "wrong_fp8_scale": "wrong fp8 scale",
    "multi_bit_flip": "multi-bit flip",
    "zero_layer": "a whole layer zero",
}
DARK = 0.55  # shares from here on are written in white
LEAST = -0.99  # lower shares are written as "<-99"


def _incidents(column: pd.Series) -> pd.Series:
    return column.replace(INCIDENTS).str.replace("_", " ")


def _shown(share: float) -> str:
    if np.isnan(share):
        return "–"
    return str(round(100 * share)) if share >= LEAST else "<-99"


def repaired(rows: pd.DataFrame) -> Figure:
    """The share of the KL that each reader (columns) removes of each incident (rows), in percent: a panel per base.

    The darker, the more. The first column is the KL without a defence, in nats; a dash stands for no damage.
    """
    bases, incidents = list(rows["base"].unique()), list(rows["incident"].unique())
    readers = [name for name in rows["reader"].unique() if name != "none"]
    size = (1.25 * TEXT_WIDTH, 0.24 * len(incidents) + 1.5)
    figure, axes = plt.subplots(1, len(bases), figsize=size, sharey=True, squeeze=False)
    for ax, base in zip(axes[0], bases, strict=True):
        own = rows[rows["base"] == base]
        shares = own.pivot(index="incident", columns="reader", values="repaired").loc[incidents, readers]
        before = own.drop_duplicates("incident").set_index("incident").loc[incidents, "kl_before"]
        _panel(ax, before.to_numpy(), shares.to_numpy(float))
        labels = ["no defence:\nKL, nats", *map(reader_label, readers)]
        ax.set_xticks(range(len(labels)), labels, rotation=90)
        ax.set_title(base.removeprefix("embedded-"))
    axes[0, 0].set_yticks(range(len(incidents)), _incidents(pd.Series(incidents)))
    return figure


def _panel(ax: Axes, before: np.ndarray, shares: np.ndarray) -> None:
    """before [I]: written only; shares [I, R]: written on cells as dark as they are large."""
    cells = np.column_stack([np.zeros(len(before)), np.nan_to_num(shares, nan=0.0).clip(0, 1)])
    ax.imshow(cells, cmap="Greys", vmin=0, vmax=1.15, aspect="auto")
    for row, kl in enumerate(before):
        ax.text(0, row, f"{kl:.2f}" if kl >= 0.005 else f"{kl:.0e}", ha="center", va="center", fontsize=6.5)
        for column, share in enumerate(shares[row], start=1):
            colour = "white" if share >= DARK else "black"
            ax.text(column, row, _shown(share), ha="center", va="center", fontsize=6.5, color=colour)
    ax.axvline(0.5, color="black", linewidth=0.8)
    ax.grid(visible=False)
    ax.tick_params(length=0)


def found(rows: pd.DataFrame) -> pd.DataFrame:
    """What was damaged, what hashes and ids find of it, and what E repairs: a row per base and incident."""
    own = rows[rows["reader"] == "E"].reset_index(drop=True)
    return pd.DataFrame({
        "base": own["base"].str.removeprefix("embedded-"),
        "incident": _incidents(own["incident"]),
        "tokens, %": 100 * own["damaged"],
        "KL": own["kl_before"],
        "hashes: found, %": 100 * own["found"],
        "named, %": 100 * own["named"],
        "right, %": 100 * own["precise"],
        "ids: found, %": 100 * own["found_by_ids"],
        "named by ids, %": 100 * own["named_by_ids"],
        "AUROC": own["auroc"],
        "KL after E": own["kl"],
        "repaired by E": brackets(own, "repaired", 2).where(own["repaired"].notna(), "no damage"),
    })  # fmt: skip


def costs(rows: pd.DataFrame) -> pd.DataFrame:
    """What each reader keeps and takes, beside the mean and the least share that it repairs: a row per base and reader.

    The mean counts shares below -1 as -1.
    """
    by_reader = rows.groupby(["base", "reader"], sort=False)
    table = pd.DataFrame({
        "bytes a token": by_reader["bits_per_token"].first() / 8,
        "bytes a cache": by_reader["cache_bytes"].first(),
        "fixed bytes": by_reader["fixed_bytes"].first(),
        "largest time, % of a prefill": 100 * by_reader["time"].max(),
        "mean repaired": by_reader["repaired"].apply(lambda shares: shares.clip(-1).mean()),
        "least repaired": by_reader["repaired"].min(),
    }).reset_index()  # fmt: skip
    return table.assign(base=table["base"].str.removeprefix("embedded-"), reader=table["reader"].map(reader_label))
