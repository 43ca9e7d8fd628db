"""What the valence experiments report: conditions against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cachemedic.corruption.types import NONE
from cachemedic.evaluation import statistics as stats
from cachemedic.models.load import Base
from cachemedic.studies.quantised_evaluation import NEAREST
from cachemedic.studies.summaries import summary
from cachemedic.training.config import TrainConfig
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.objective import ValenceObjective

VALENCE = ValenceObjective()
# Parts (b) to (d): the objective with one thing changed.
VARIANTS = {
    "valence": VALENCE,
    "without soft": replace(VALENCE, lambda_soft=0),
    "without feature": replace(VALENCE, lambda_feature=0),
    "without sequence": replace(VALENCE, lambda_sequence=0),
    "without future valence": replace(VALENCE, lambda_valence=0),
    "lambda 0 (uniform)": replace(VALENCE, lam=0),
    "lambda 5": replace(VALENCE, lam=5.0),
    "lambda 8": replace(VALENCE, lam=8.0),
    "shuffled weights": replace(VALENCE, weighting="shuffled"),
    "code excerpt": ValenceObjective.preset("excerpt"),
}


def against(grid: pd.DataFrame, reference: str) -> pd.DataFrame:
    """`summaries.summary` of every task and reader, and its paired difference to the reader `reference`.

    difference: of the mean KL over types and severities, in nats a token, below zero where the reader is better;
    with the limits of a 95% t interval over seeds.
    """
    kl = grid[grid["type"] != NONE].groupby(["task", "reader", "seed"])["kl"].mean()
    rows = []
    for task, reader in kl.index.droplevel("seed").unique():
        interval = stats.paired_interval(kl[task, reader], kl[task, reference])
        rows.append((task, reader, interval.estimate, interval.low, interval.high))
    columns = ["task", "reader", "difference", "difference_low", "difference_high"]
    return summary(grid).merge(pd.DataFrame(rows, columns=columns), on=["task", "reader"])


def bits_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of each reader (`quantised_scores`), and NLL lost and won over rounding to nearest, over seeds."""
    nll = scores.set_index(["reader", "seed"])["nll"]
    rows = []
    for reader, part in scores.groupby("reader", sort=False):
        lost = stats.paired_interval(part["nll"], part["nll_clean"])
        row = {
            "reader": reader,
            "bits": part["bits"].iloc[0],
            "bytes_per_token": part["bytes_per_token"].iloc[0],
            "perplexity": float(np.exp(part["nll"]).mean()),
            **lost.columns("lost"),
        }
        nearest = f"{reader.partition(',')[0]}, {NEAREST}"
        if nearest in nll and nearest != reader:
            gain = stats.paired_interval(nll[nearest], nll[reader])
            row |= gain.columns("gain")
        rows.append(row | {"n_seeds": len(part)})
    return pd.DataFrame(rows)


@torch.no_grad()
def effective_sequences(base: Base, config: TrainConfig, names: Sequence[str], batches: int) -> pd.DataFrame:
    """The effective number of sequences, (sum w)^2 / sum w^2, of each condition: mean over the first `batches`.

    Columns condition, batch, effective.
    """
    trainer = Trainer(base, replace(config, seeds=config.seeds[:1], gate=None), Path())
    parts = [trainer.objective(trainer.forward(trainer.draw(step)))["effective"] for step in range(batches)]
    effective = torch.stack(parts).mean(0).tolist()
    return pd.DataFrame({"condition": names, "batch": config.batch, "effective": effective})
