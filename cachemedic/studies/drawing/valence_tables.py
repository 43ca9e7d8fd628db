"""The tables of valence-weighted distillation."""

from __future__ import annotations

import pandas as pd

from cachemedic.evaluation import statistics as stats
from cachemedic.studies.drawing.tables import brackets

TERMS = ("soft", "feature", "sequence", "future valence")
PARTS = {  # by name of table and figure: its title, and which conditions it shows
    "valence_terms": ("terms removed", ["valence", *[f"without {term}" for term in TERMS]]),
    "valence_lambda": ("strength of the weights", ["lambda 0 (uniform)", "lambda 5", "valence", "lambda 8"]),
    "valence_controls": ("controls", ["valence", "shuffled weights", "lambda 0 (uniform)", "code excerpt"]),
    "valence_gate": ("mercy gate", ["valence", "gate: rollouts", "gate: proxy"]),
}


def difference_table(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """`against` rows for a reader of the paper."""
    return pd.DataFrame({
        "task": rows["task"],
        "reader": rows["reader"],
        "recovery (KL)": brackets(rows, "kl_recovery"),
        "recovery (NLL)": brackets(rows, "recovery"),
        "clean cost, %": brackets(rows, "clean_regression", 2),
        f"KL less that of {reference}, 1e-3": brackets(1e3 * rows[["difference", "difference_low", "difference_high"]],
                                                        "difference"),
        "seeds": rows["n_seeds"],
    })  # fmt: skip


def gate_table(checks: pd.DataFrame) -> pd.DataFrame:
    """How often each gate was asked and blocked, and the mean ratio of projected to baseline valence by seed."""
    ratio = checks.assign(ratio=checks["projected"] / checks["baseline"])
    rows = []
    for name, part in ratio.groupby("gate", sort=False):
        interval = stats.t_interval(part.groupby("seed")["ratio"].mean())
        rows.append({
            "gate": name,
            "checks": len(part),
            "blocked": int(part["blocked"].sum()),
            "projected / teacher": str(interval),
            "lowest ratio": part["ratio"].min(),
        })  # fmt: skip
    return pd.DataFrame(rows)
