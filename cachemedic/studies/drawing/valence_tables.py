"""The table of valence-weighted distillation."""

from __future__ import annotations

import pandas as pd

from cachemedic.studies.drawing.readers import reader_label
from cachemedic.studies.drawing.tables import brackets


def valence_table(rows: pd.DataFrame) -> pd.DataFrame:
    """`valence_report.summary` rows for a reader of the paper; a difference is to the valence objective."""
    limits = ["gap_less", "gap_less_low", "gap_less_high"]
    effective = rows["effective"].map("{:.2f}".format).where(rows["effective"].notna(), "--")
    return pd.DataFrame({
        "family": rows["family"].where(rows["reader"] != "none", "--"),
        "trained by": rows["reader"].map(reader_label),
        "KL": brackets(rows, "kl"),
        "|v_S - v_T|": brackets(rows, "gap"),
        "less that of valence, 1e-3": brackets(1e3 * rows[limits], "gap_less", 1),
        "projected ratio": brackets(rows, "ratio"),
        "shift of sentiment": brackets(rows, "shift"),
        "sequences of 8": effective,
    })  # fmt: skip
