"""Figure and tables of the learned quantiser."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.style import TEXT_WIDTH, errors, line_styles
from cachemedic.studies.drawing.tables import brackets

MEASURES = {"kl": "KL, nats per token", "valence_gap": "$|v_S - v_T|$"}
TABLED = {"kl": "KL", "lost": "NLL", "valence_gap": "valence"}
FULL = "16 bits"


def frontier(rows: pd.DataFrame) -> Figure:
    """KL and valence gap against bytes a token, a curve per method (`learned_quantiser.summary`), both axes in
    logarithms."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(TEXT_WIDTH, 3.3))
    shown = rows[rows["method"] != FULL]
    styles = line_styles(list(shown["method"].unique()))
    for ax, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for i, (method, style) in enumerate(styles.items()):
            part = shown[shown["method"] == method].sort_values("bytes_per_token")
            places = part["bytes_per_token"] * (1 + 0.008 * (i - len(styles) / 2))  # side by side
            ax.errorbar(places, part[measure], errors(part, measure), **style, label=method)
        ax.set(xscale="log", yscale="log", xlabel="bytes a cached token", ylabel=label)
        ticks = [300, 500, 1000, 2000]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def storage_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every way to store, for a reader of the paper."""
    table = pd.DataFrame({
        "cache": rows["method"],
        "bits": rows["bits"].astype(str).where(rows["bits"] > 0, "--"),
        "group": rows["group"].astype(str).where(rows["group"] > 0, "--"),
        "bytes a token": rows["bytes_per_token"].astype(int),
    })  # fmt: skip
    return table.assign(**{
        "KL": brackets(rows, "kl", 4),
        "NLL lost": brackets(rows, "lost", 4),
        "valence gap": brackets(rows, "valence_gap", 4),
    })  # fmt: skip


def paired_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What is saved against others of the same bytes, for a reader of the paper."""
    columns = {"cache": rows["method"], "against": rows["against"], "bits": rows["bits"]}
    columns["bytes a token"] = rows["bytes_per_token"].astype(int)
    return pd.DataFrame(columns | {f"{label} saved": brackets(rows, name, 4) for name, label in TABLED.items()})
