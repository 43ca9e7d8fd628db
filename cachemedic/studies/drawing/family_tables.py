"""The tables of operator families, real faults and the code, from the frames that studies write as CSVs."""

from __future__ import annotations

import pandas as pd

from cachemedic.studies.drawing.readers import reader_label
from cachemedic.studies.drawing.tables import brackets


def _names(column: pd.Series) -> pd.Series:
    return column.str.removeprefix("embedded-").str.replace("_", " ")


def results(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `summaries.summary` with base, share and mean_recovery."""
    table = pd.DataFrame(
        {
            "base": _names(rows["base"]),
            "reader": rows["reader"].map(reader_label),
            "bytes, %": 100 * rows["share"],
            "NLL recovered": brackets(rows, "recovery"),
            "KL recovered": brackets(rows, "kl_recovery"),
            "mean over severities": rows["mean_recovery"],
            "clean cost, % ppl": brackets(rows, "clean_regression", 2),
        }
    )
    return table[rows["reader"] != "none"]


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `summaries.advantage` with base and reference."""
    table = pd.DataFrame(
        {
            "base": _names(rows["base"]),
            "reader": rows["reader"].map(reader_label),
            "against": rows["reference"].map(reader_label),
            "NLL": brackets(rows, "nll_advantage"),
            "KL": brackets(rows, "kl_advantage"),
        }
    )
    return table[(rows["reader"] != "none") & (rows["reader"] != rows["reference"])]


def held_out(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `summaries.recovery_by_severity` with base: the mean over severities, a column per type."""
    table = rows[rows["reader"] != "none"].groupby(["base", "reader", "type"])["recovery"].mean().unstack("type")
    table.insert(0, "mean", table.mean(axis=1))
    table = table.rename(columns=lambda name: name.replace("_", " ")).reset_index()
    return table.assign(base=_names(table["base"]), reader=table["reader"].map(reader_label))


def ablations(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `summaries.summary` with share."""
    table = pd.DataFrame(
        {
            "condition": rows["reader"].map(reader_label),
            "bytes, %": 100 * rows["share"],
            "NLL recovered": brackets(rows, "recovery"),
            "KL recovered": brackets(rows, "kl_recovery"),
        }
    )
    return table[rows["reader"] != "none"]


def quality(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of `repair_quality`, with base and type."""
    return pd.DataFrame(
        {
            "base": _names(rows["base"]),
            "reader": rows["reader"].map(reader_label),
            "type": _names(rows["type"]),
            "rho": brackets(rows, "rho", 2),
            "score error": brackets(rows, "score_error", 2),
        }
    )


def faults(rows: pd.DataFrame, fault: str) -> pd.DataFrame:
    """KL to the clean model of every reader (rows) at every parameter (columns) of one fault, without intervals."""
    own = rows[rows["type"] == fault]
    cells = [f"{kl:.4f}" if failed == 0 else "fails" for kl, failed in zip(own["kl"], own["failed"], strict=True)]
    own = own.assign(cell=cells, base=_names(own["base"]), reader=own["reader"].map(reader_label))
    table = own.pivot_table(index=["base", "reader"], columns="parameter", values="cell", aggfunc="first", sort=False)
    return table.rename(columns=lambda parameter: f"{parameter:g}").reset_index()
