"""Tables and figures of answers behind damaged caches, and the story of the paper's first page."""

from __future__ import annotations

from textwrap import fill

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.studies.drawing.readers import head_of, numbered_label, reader_styles
from cachemedic.studies.drawing.style import TEXT_WIDTH, errors
from cachemedic.studies.drawing.tables import brackets

SHOWN = {"clean": "sound cache", "none": "damaged", "D": "repaired by D", "E": "repaired by E"}
COMPARED = ("none", "shadow_2bit", "D", "E, code alone", "E")  # question by question
TYPE, SEVERITY = "gaussian", 0.5  # of the conversations that are shown
EXAMPLES_CAPTION = "Greedy answers behind a cache under noise of severity 0.5: the first conversation of each kind."
QUESTIONS_CAPTION = (
    "Answers behind damaged caches, by question: the share that names the fact, over all types and severities; 95\\% "
    "intervals over seeds."
)
MARK = "\N{HORIZONTAL ELLIPSIS}"


def _first_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """The conversations of the first seed that are shown, the first one of each kind."""
    own = rows[(rows["seed"] == rows["seed"].min()) & (rows["type"] == TYPE) & (rows["severity"] == SEVERITY)]
    return own[own["example"] < rows["question"].nunique()]


def examples(rows: pd.DataFrame, width: int = 30) -> pd.DataFrame:
    """One line per question with the answers behind the sound, the damaged and the repaired caches."""
    own = _first_seed(rows).pivot(index=["example", "question", "fact"], columns="reader", values="answer")
    own = own.reset_index()
    shown = own[["question", "fact"]].join(own[list(SHOWN)].map(lambda text: _cut(text, width)))
    return shown.rename(columns=SHOWN)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width].rsplit(" ", 1)[0] + MARK


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The shares of `answers_results` with their intervals."""
    shown = {"reader": rows["reader"].map(lambda name: SHOWN["clean"] if name == "clean" else numbered_label(name))}
    shown |= {"bytes, %": 100 * rows["share"]}
    return pd.DataFrame(shown | {"names the fact": brackets(rows, "named"), "same tokens": brackets(rows, "same")})


def caption(rows: pd.DataFrame, seeds: int) -> str:
    """Of the table: how many conversations under which damage."""
    count = rows[["seed", "example"]].drop_duplicates().shape[0]
    return (
        "Answers behind damaged caches: the share that names the fact, and the share of tokens that are those of the "
        f"clean answer; {count} conversations of {seeds} seeds under {rows['type'].nunique()} types of damage "
        f"at severities {', '.join(f'{s:g}' for s in sorted(rows['severity'].unique()))}; 95\\% intervals over seeds."
    )


def question_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The share of answers that name the fact, a row for each question: `answers_by_question`."""
    cells = rows.assign(named=brackets(rows, "named", 2)).pivot(index="question", columns="reader", values="named")
    return cells[list(COMPARED)].rename(columns=numbered_label).reset_index()


def by_type(rows: pd.DataFrame) -> Figure:
    """The share of answers that name the fact against severity, a panel per type: `answers_by_type`.

    Copies in other groups than the usual ones stand in the table alone.
    """
    clean = float(rows.loc[rows["reader"] == "clean", "named"].mean())
    readers = [name for name in rows["reader"].unique() if name != "clean" and head_of(name) == name]
    styles = reader_styles(readers)
    figure, axes = plt.subplots(2, 3, figsize=(TEXT_WIDTH, 4.2), sharex=True, sharey=True)
    for ax, kind in zip(axes.flat, rows["type"].unique(), strict=False):
        for i, reader in enumerate(readers):
            own = rows[(rows["type"] == kind) & (rows["reader"] == reader)].sort_values("severity")
            beside = own["severity"] + 0.012 * (i - (len(readers) - 1) / 2)
            ax.errorbar(beside, own["named"], errors(own, "named"), **styles[reader])
        ax.axhline(clean, color="0.6", linewidth=0.8, zorder=0)
        ax.set(title=kind.replace("_", " "), ylim=(-0.03, 1.05))
    for ax in axes[-1]:
        ax.set_xlabel("severity $s$")
        ax.set_xticks([0.5, 0.75, 1.0])
    figure.supylabel("answers that name the fact", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def story(rows: pd.DataFrame, frontier: pd.DataFrame) -> Figure:
    """A damaged answer, repaired; beside it what each repair leaves against its time, where noise hit every token.

    rows: of `answers`; frontier: of `frontier_results`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 2.9), width_ratios=(1.05, 1))
    own = _first_seed(rows)
    own = own[own["example"] == own["example"].min()].set_index("reader")
    left.axis("off")
    lines = [("question", own["question"].iloc[0])] + [(SHOWN[name], own.loc[name, "answer"]) for name in SHOWN]
    for place, (name, text) in enumerate(lines):
        height = 1.0 - 0.205 * place
        left.text(0, height, name, fontsize=7, color="0.35", va="top", transform=left.transAxes)
        shown = fill(_cut(text, 88), 46)
        left.text(0, height - 0.055, shown, fontsize=7.5, va="top", transform=left.transAxes, parse_math=False)
    own = frontier[(frontier["fault"] == "noise") & (frontier["damaged"] == 1.0)].set_index("reader")
    readers = [name for name in own.index if name != "none"]
    styles = reader_styles(readers)
    right.axhline(own.loc["none", "kl"], color="0.6", linewidth=0.8, zorder=0)
    for reader in readers:
        row = own.loc[[reader]]
        style = styles[reader] | {"linestyle": "none", "markersize": 4 + 10 * float(row["share"].iloc[0]) ** 0.5}
        right.errorbar(row["time"], row["kl"], errors(row, "kl"), errors(row, "time"), **style)
    right.set_xscale("symlog", linthresh=0.01, linscale=0.5)
    right.set_yscale("symlog", linthresh=1e-3, linscale=0.5)
    right.set(xlim=(-0.002, 2), ylim=(-3e-4, 6), xlabel="time, share of a prefill", ylabel="KL left, nats per token")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure
