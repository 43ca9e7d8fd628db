"""The figure and the table of notebook 23."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import numbered_label, reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors, line_styles
from cachemedic.studies.drawing.tables import brackets

# Of heuristics and copies one is enough in a figure.
SHOWN = ("none", "shadow_2bit", "D, hashes", "E, code alone", "E", "recompute")


def _label(reader: str) -> str:
    return "sound cache" if reader == "clean" else numbered_label(reader)


def _beside(ax: Axes, rows: pd.DataFrame, place: float, name: str, style: dict) -> None:
    """Values of column `name` by length, a little beside the length, on a logarithmic axis."""
    rows = rows.sort_values("length")
    ax.errorbar(rows["length"] * 1.03**place, rows[name], errors(rows, name), **style)


def figure(named: pd.DataFrame, kl: pd.DataFrame, severity: pd.DataFrame) -> Figure:
    """Answers that name the fact, KL, and the damage of equal parameters, all against the number of cached tokens.

    named, kl, severity: `long_contexts_named`, `long_contexts_kl` and `long_contexts_severity`.
    """
    test = named[named["split"] == "test"]
    readers = [name for name in kl["reader"].unique() if name in SHOWN]
    styles = reader_styles(readers)
    drawn, axes = plt.subplots(2, 2, figsize=(TEXT_WIDTH, 5.4))
    sound = test[test["reader"] == "clean"].sort_values("length")
    faults = [kind for kind in test["type"].unique() if kind != "none"]
    for ax, kind in zip(axes[0], faults, strict=True):
        ax.plot(sound["length"], sound["named"], color="0.6", linewidth=0.8, zorder=0, label=_label("clean"))
        for i, reader in enumerate(readers):
            own = test[(test["type"] == kind) & (test["reader"] == reader)]
            _beside(ax, own, i - (len(readers) - 1) / 2, "named", styles[reader])
        ax.set(title=f"facts, {kind}", ylim=(-0.03, 1.05), ylabel="answers that name the fact")
    below = axes[1, 0]
    for i, reader in enumerate(readers):
        _beside(below, kl[kl["reader"] == reader], i - (len(readers) - 1) / 2, "kl", styles[reader])
    below.set_yscale("symlog", linthresh=1e-3, linscale=0.5)
    below.set(title="continuations, noise on a quarter", ylabel="KL left, nats per token", ylim=(-2e-4, None))
    right, kinds = axes[1, 1], list(severity["type"].unique())
    for i, (kind, style) in enumerate(line_styles(kinds).items()):
        own = severity[severity["type"] == kind]
        _beside(right, own, i - (len(kinds) - 1) / 2, "damage", style | {"label": kind.replace("_", " ")})
    right.axhline(0.5, color="0.6", linewidth=0.8, zorder=0)
    right.set(title="parameters of severity 0.5 at 128", ylabel="damage, of context's value")
    right.set_ylim(top=1.35 * right.get_ylim()[1])  # room for the legend
    right.legend(fontsize=6.5, ncols=2, loc="upper left")
    for ax, rows in zip(axes.flat, (test, test, kl, severity), strict=True):
        ax.set_xscale("log")
        lengths = sorted(rows["length"].unique())
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.minorticks_off()
        ax.set_xlabel("cached tokens")
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return drawn


def table(named: pd.DataFrame, kl: pd.DataFrame) -> pd.DataFrame:
    """A line per reader: bytes, answers that name the fact by fault and length, KL by length with its interval."""
    test = named[named["split"] == "test"]
    readers = list(kl["reader"].unique())
    share = kl.drop_duplicates("reader").set_index("reader")["share"]
    shown = pd.DataFrame({"reader": [_label(name) for name in readers], "bytes, %": 100 * share[readers].to_numpy()})
    for (kind, length), rows in test[test["type"] != "none"].groupby(["type", "length"], sort=False):
        counts = {row.reader: f"{row.n_named}/{row.n_examples}" for row in rows.itertuples()}
        shown[f"{kind.split()[-1]}, {length:,}"] = [counts.get(name) for name in readers]  # not all were asked
    for length, rows in kl.groupby("length", sort=False):
        rounded = rows.set_index("reader").loc[readers, ["kl", "kl_low", "kl_high"]].round(3) + 0.0  # no negative zero
        shown[f"KL, {length:,}"] = brackets(rounded, "kl").to_numpy()
    return shown


def caption(named: pd.DataFrame, kl: pd.DataFrame) -> str:
    """Of the table: what was measured, and what the sound cache answers."""
    sound = named[(named["split"] == "test") & (named["reader"] == "clean")].sort_values("length")
    counts = ", ".join(
        f"{right} of {asked} at {length:,}"
        for right, asked, length in zip(sound["n_named"], sound["n_examples"], sound["length"], strict=True)
    )
    return (
        "Long contexts, SmolLM2. Left: answers that name a hidden fact, by cached tokens, behind noise and where "
        "another text was written; the passages of all facts and a quarter of the rest are hit. The sound cache "
        f"answers {counts}. Right: KL left behind noise on a quarter of the tokens, nats per token; 95\\% intervals "
        f"over {kl['n_seeds'].iloc[0]} seeds. All repairs and copies know by hashes what is damaged."
    )
