"""Summaries as tables for a reader: intervals as text, columns by the names of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cachemedic.evaluation import statistics as stats
from cachemedic.studies.drawing.readers import reader_label


def brackets(rows: pd.DataFrame, name: str, digits: int = 3) -> pd.Series:
    """Column `name` with its interval as text: `0.123 [0.101, 0.145]`."""
    columns = (rows[name], rows[f"{name}_low"], rows[f"{name}_high"])
    texts = [f"{x:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" for x, low, high in zip(*columns, strict=True)]
    return pd.Series(texts, rows.index)


def results_table(rows: pd.DataFrame) -> pd.DataFrame:
    """`summary` rows for a reader of the paper.

    Needs the columns base, setting, best_heuristic and bits_per_token (what a reader keeps of the cache), too.
    """
    conditions = pd.DataFrame({
        "task": rows["task"],
        "base": rows["base"].str.removeprefix("embedded-"),
        "setting": rows["setting"],
        "reader": rows["reader"].map(reader_label) + np.where(rows["best_heuristic"], " *", ""),
        "kept, bytes": (rows["bits_per_token"] / 8).round().astype(int),
    })  # fmt: skip
    return conditions.join(measures(rows))


def measures(rows: pd.DataFrame) -> pd.DataFrame:
    """What `summary` rows measure, each with its interval as text, and the numbers of seeds and examples."""
    return pd.DataFrame({
        "AUC": brackets(rows, "auc", 4),
        "recovered NLL": brackets(rows, "recovery"),
        "recovered KL": brackets(rows, "kl_recovery"),
        "clean cost, % ppl": brackets(rows, "clean_regression", 2),
        "seeds": rows["n_seeds"],
        "examples": rows["n_examples"],
    })  # fmt: skip


def contraction_table(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """rho of operator A by `keys` and type with its interval, beside its bounds (`contraction.measure_contraction`)."""
    groups = rows.groupby([*keys, "type"], sort=False)
    table = groups[["bound_rank", "bound_full", "rank_floor"]].mean()
    table.insert(0, "rho of operator A", [str(stats.t_interval(part["rho"])) for _, part in groups])
    table = table.reset_index().replace({"type": {"_": " "}, "base": {"embedded-": ""}}, regex=True)
    names = {"bound_rank": "bound, rank 8", "bound_full": "bound, full rank", "rank_floor": "rank floor"}
    return table.rename(columns=names)
