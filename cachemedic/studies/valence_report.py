"""What the valence experiments report: conditions against a reference, and what the gate did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from cachemedic.corruption.types import NONE
from cachemedic.evaluation import statistics as stats
from cachemedic.models.load import Base
from cachemedic.studies.summaries import summary
from cachemedic.training.config import TrainConfig
from cachemedic.training.trainer import GATE_LOG, Trainer
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


def gate_log(folders: Mapping[str, Path]) -> pd.DataFrame:
    """The checks of the mercy gate beside trained operators, by a name for each folder.

    Columns gate, seed, step, projected, baseline, blocked.
    """
    rows = []
    for name, folder in folders.items():
        for line in (folder / GATE_LOG).read_text().splitlines():
            check = json.loads(line)
            seed = int(check["run_id"].split("/")[1].removeprefix("seed"))
            rows.append((name, seed, *(check[k] for k in ("step", "projected", "baseline", "blocked"))))
    return pd.DataFrame(rows, columns=["gate", "seed", "step", "projected", "baseline", "blocked"])


@torch.no_grad()
def effective_sequences(base: Base, config: TrainConfig, names: Sequence[str], batches: int) -> pd.DataFrame:
    """The effective number of sequences, (sum w)^2 / sum w^2, of each condition: mean over the first `batches`.

    Columns condition, batch, effective.
    """
    trainer = Trainer(base, replace(config, seeds=config.seeds[:1], gate=None), Path())
    parts = [trainer.objective(trainer.forward(trainer.draw(step)))["effective"] for step in range(batches)]
    effective = torch.stack(parts).mean(0).tolist()
    return pd.DataFrame({"condition": names, "batch": config.batch, "effective": effective})
