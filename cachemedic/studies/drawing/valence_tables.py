"""The tables of valence-weighted distillation and of the quantised cache."""

from __future__ import annotations

import pandas as pd

from cachemedic.studies.drawing.tables import brackets

TERMS = ("soft", "feature", "sequence", "future valence")
PARTS = {  # by name of table and figure: its title, and which conditions it shows
    "valence_terms": ("terms removed", ["valence", *[f"without {term}" for term in TERMS]]),
    "valence_lambda": ("strength of the weights", ["lambda 0 (uniform)", "lambda 5", "valence", "lambda 8"]),
    "valence_controls": ("controls", ["valence", "shuffled weights", "lambda 0 (uniform)", "code excerpt"]),
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


def bits_for_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """`bits_table` rows for a reader of the paper."""
    won = brackets(rows, "gain").where(rows["gain"].notna(), "--")
    return pd.DataFrame({
        "cache": rows["reader"],
        "bytes a token": rows["bytes_per_token"].astype(int),
        "perplexity": rows["perplexity"],
        "NLL lost": brackets(rows, "lost"),
        "won over nearest": won,
        "seeds": rows["n_seeds"],
    })  # fmt: skip
