"""Figures and tables of the mercy gate."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.evaluation import statistics as stats
from cachemedic.studies.drawing.style import TEXT_WIDTH, line_styles
from cachemedic.studies.drawing.tables import brackets

LABELS = {"gate: rollouts": "a gate by rollouts", "gate: proxy": "a gate by the proxy"}
PROJECTIONS = {"rollout": "by rollouts", "proxy": "by the proxy"}
CURVES = {
    "loss_kd": "distillation loss",
    "loss_id": "identity loss",
    "loss_contr": "contraction term",
    "rho_mean": "rho, mean",
    "rho_p95": "rho, 95th percentile",
}


def checks(rows: pd.DataFrame, threshold: float) -> Figure:
    """Projected over the teacher's valence after every update that was measured, in a column per gate, a line per seed.

    The upper row is projected by rollouts, the lower one by the proxy; crosses: updates that were taken back.
    """
    gates = list(rows["gate"].unique())
    size = (TEXT_WIDTH, 3.8)
    figure, axes = plt.subplots(2, len(gates), figsize=size, sharex=True, sharey=True, squeeze=False)
    styles = line_styles([str(s) for s in rows["seed"].unique()])
    for column, gate in enumerate(gates):
        for ax, (projection, label) in zip(axes[:, column], PROJECTIONS.items(), strict=True):
            for seed, style in styles.items():
                own = rows[(rows["gate"] == gate) & (rows["seed"] == int(seed))].dropna(subset=[projection])
                ax.plot(own["step"], own[projection], **style | {"markersize": 2}, label=f"seed {seed}")
                blocked = own[own["blocked"]]
                ax.plot(blocked["step"], blocked[projection], "x", color="0.2", markersize=6, zorder=3)
            ax.axhline(threshold, color="0.6", linewidth=0.8, zorder=0)
            axes[0, column].set_title(gate)
            axes[1, column].set_xlabel("update")
            if not column:
                ax.set_ylabel(f"projected / teacher's,\n{label}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def training_curves(rows: pd.DataFrame) -> Figure:
    """Losses and contraction ratios of training logs by update, a line per reader; what a log lacks is left out."""
    measured = {name: label for name, label in CURVES.items() if rows[name].notna().any()}
    figure, axes = plt.subplots(2, 3, figsize=(TEXT_WIDTH, 4.2))
    styles = line_styles(list(rows["reader"].unique()))
    for ax, (name, label) in zip(axes.flat, measured.items(), strict=False):
        for reader, style in styles.items():
            own = rows[rows["reader"] == reader]
            ax.plot(own["step"], own[name], **style | {"marker": ""}, label=reader)
        ax.set(title=label, xlabel="update", yscale="log")
    for ax in axes.flat[len(measured) :]:
        ax.set_axis_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def rates_table(rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """The ratio on validation by learning rate of training without a gate."""
    groups = rows.groupby("learning_rate")
    return pd.DataFrame({
        "learning rate": [f"{rate:g}" for rate, _ in groups],
        "projected / teacher's": [str(stats.t_interval(part["ratio"])) for _, part in groups],
        "least of a seed": [part["ratio"].min() for _, part in groups],
        f"below {threshold:g}": [f"{(part['ratio'] < threshold).sum()} of {len(part)}" for _, part in groups],
        "chosen": ["yes" if part["chosen"].all() else "" for _, part in groups],
    })  # fmt: skip


def outcome_table(results: pd.DataFrame) -> pd.DataFrame:
    """`gate_report.outcome` rows for a reader of the paper."""
    return pd.DataFrame({
        "training": results["reader"].replace({"none": "none, no repair"}),
        "projected / teacher's": brackets(results, "ratio"),
        "less that without a gate": brackets(results, "difference"),
        "recovered KL": brackets(results, "kl_recovery"),
        "recovered NLL": brackets(results, "recovery"),
        "clean cost, % ppl": brackets(results, "clean_regression", 2),
        "seeds": results["n_seeds"],
    })  # fmt: skip


def cost_table(cost: pd.DataFrame, agreement: pd.DataFrame) -> pd.DataFrame:
    """What each gate blocked and took per run, and what the two ways to project would have blocked in all runs."""
    rows = cost.merge(agreement, on="gate")
    return pd.DataFrame({
        "training": rows["gate"],
        "checks": rows["checks"].astype(int),
        "blocked": rows["blocked"],
        "passes": rows["passes"].astype(int),
        "tokens": rows["tokens"].astype(int),
        "share of training's": (rows["tokens"] / rows["training_tokens"]).map("{:.2f}".format),
        "projected twice": rows["compared"],
        "low by rollouts": rows["by_rollouts"],
        "missed by the proxy": rows["missed"],
        "false alarms of it": rows["false_alarms"],
    })  # fmt: skip


def found(
    results: pd.DataFrame, ratios: pd.DataFrame, rows: pd.DataFrame, agreement: pd.DataFrame, threshold: float
) -> str:
    """The findings in sentences, as the intervals have them."""
    own, sentences = results.set_index("reader"), []
    for gate in agreement["gate"]:
        reader, ends = own.loc[gate], ratios.loc[ratios["reader"] == gate, "ratio"]
        ratio = str(stats.Interval(*(reader[f"ratio{limit}"] for limit in ("", "_low", "_high"))))
        of_gate = rows[rows["gate"] == gate]
        sentences.append(
            f"With {LABELS.get(gate, gate)} the valence on held-out prompts ends at "
            f"{ratio} of the teacher's, below {threshold:g} in {(ends < threshold).sum()} of {len(ends)} runs; "
            f"{of_gate['blocked'].sum()} of {len(of_gate)} checks failed, and after "
            f"{(of_gate['kept'] < threshold).sum()} the state that was kept was below {threshold:g}. The recovered KL "
            f"is {reader['kl_recovery']:.2f}."
        )
        if reader["difference_low"] > 0 or reader["difference_high"] < 0:
            more = "more" if reader["difference"] > 0 else "less"
            sentences.append(f"That is {more} than without a gate, by {abs(reader['difference']):.3f}.")
        elif reader["difference"] != 0:
            sentences.append("A difference to training without a gate is not shown.")
    if (own.loc[list(agreement["gate"]), "kl_recovery_high"] < 0).all():
        sentences.append(
            "At this learning rate every operator does more damage than the faults, with a gate as without: valence "
            "is a level, not a quality, and a state whose rollouts are as positive as the teacher's passes, "
            "whatever it says."
        )
    total = agreement.sum(numeric_only=True)
    sentences.append(
        f"Of {total['by_rollouts']:.0f} updates that rollouts put below {threshold:g}, the proxy passed "
        f"{total['missed']:.0f}; of {total['by_proxy']:.0f} that the proxy put below it, rollouts passed "
        f"{total['false_alarms']:.0f} ({total['compared']:.0f} updates were projected both ways)."
    )
    return " ".join(sentences)
