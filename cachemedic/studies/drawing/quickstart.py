"""The figure of notebook 01, which computes while it is read: other figures do not make it stale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.style import TEXT_WIDTH, errors, line_styles


def quickstart(token: Mapping[str, Sequence[float]], tokens: Sequence[str], title: str, grid: pd.DataFrame) -> Figure:
    """Probabilities of some `tokens` under each reader, and the KL of each reader on held-out text.

    token: by reader ("clean", "corrupted", "repaired") the probabilities of `tokens`; grid: as `summaries.intervals`.
    """
    styles = line_styles(list(token))
    types = [kind for kind in grid["type"].unique() if kind != "none"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 2.8))
    for i, (name, probabilities) in enumerate(token.items()):
        left.barh([y + 0.27 * (i - 1) for y in range(len(tokens))], probabilities, 0.27, color=styles[name]["color"])
        rows = grid[grid["reader"] == name].set_index("type").reindex(types)  # none of the clean cache
        places = [y + 0.27 * (i - 1.5) for y in range(len(types))]
        style = styles[name] | {"linestyle": "none"}
        right.errorbar(rows["kl"], places, xerr=errors(rows, "kl"), **style, label=name)
    for ax, names in ((left, tokens), (right, [kind.replace("_", " ") for kind in types])):
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    left.set(title=title, xlabel="probability", xlim=(0, 1))
    right.set(title="held-out text", xlabel="KL, nats per token", xlim=(0, None))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
    return figure
