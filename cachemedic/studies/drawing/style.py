"""How figures look: colours, markers and dashes that differ in grey and in print, sizes, and error bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart, ordered so that neighbours differ in grey, too.
COLOURS = ("#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#E69F00", "#7F7F7F")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
TEXT_WIDTH = 6.5  # inches of the paper's text block

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # text stays text in the PDF
}


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `plot` for each name: colour, marker and dashes, so that lines differ in grey and in print.

    Give all figures the same sequence of names, so that a name looks the same in each. At most eight names.
    """
    if len(names) > len(COLOURS):
        raise ValueError(f"at most {len(COLOURS)} lines can be told apart, not {len(names)}; use panels")
    styles = zip(names, COLOURS, MARKERS, LINES, strict=False)
    return {name: {"color": c, "marker": m, "linestyle": dashes} for name, c, m, dashes in styles}


def mark_beyond(ax: Axes, x: Iterable[float], y: Iterable[float], colour: str) -> None:
    """An arrow with the number at the edge of an axis for each dot that lies beyond its limits, in the dot's colour.

    Call it when limits and scales are set. Dots beyond both limits, or that are not numbers, have none.
    """
    (left, right), (low, high) = ax.get_xlim(), sorted(ax.get_ylim())
    place: tuple[float, float]
    how: dict[str, Any]
    for a, b in zip(x, y, strict=True):
        if low <= b <= high and (a < left or a > right):
            beyond = a < left
            text, place, inwards = (f"← {a:.1f}", (0, b), (3, 0)) if beyond else (f"{a:.1f} →", (1, b), (-3, 0))
            how = {"xycoords": ax.get_yaxis_transform(), "ha": "left" if beyond else "right", "va": "center"}
        elif left <= a <= right and (b < low or b > high):
            beyond = b < low
            text, place, inwards = (f"↓ {b:.1f}", (a, 0), (0, 3)) if beyond else (f"↑ {b:.1f}", (a, 1), (0, -3))
            how = {"xycoords": ax.get_xaxis_transform(), "ha": "center", "va": "bottom" if beyond else "top"}
        else:
            continue
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # a bar may run through the text
        ax.annotate(text, place, inwards, textcoords="offset points", color=colour, fontsize=6.5, bbox=behind, **how)


def errors(rows: pd.DataFrame, name: str) -> list[pd.Series]:
    """The lengths of error bars below and above column `name`, from its bounds."""
    return [rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
