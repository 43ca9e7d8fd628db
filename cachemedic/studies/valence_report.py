"""What the valence study compares, by name, and what it reports of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from cachemedic.corruption.types import NONE
from cachemedic.evaluation import statistics as stats
from cachemedic.models.load import Base
from cachemedic.training.config import Objective, TrainConfig
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.objective import ValenceObjective

CANONICAL, VALENCE = "canonical", "valence"
DEFAULT = ValenceObjective()
# The valence objective, and with one thing changed.
VARIANTS: dict[str, Objective] = {
    VALENCE: DEFAULT,
    "lambda 0 (uniform)": replace(DEFAULT, lam=0),
    "shuffled weights": replace(DEFAULT, weighting="shuffled"),
    "without future valence": replace(DEFAULT, lambda_valence=0),
    "lambda 5": replace(DEFAULT, lam=5.0),
    "lambda 8": replace(DEFAULT, lam=8.0),
    "lambda learned": replace(DEFAULT, learn_lam=True),
    "T 4": replace(DEFAULT, temperature=4.0),
    "T 8": replace(DEFAULT, temperature=8.0),
    "hidden states only": replace(DEFAULT, features="hidden"),
    "attention outputs only": replace(DEFAULT, features="attention"),
    # under lambda_reg <= 1e-4 a smaller weight would be next to nothing
    "contrastive, weight 0.1": replace(DEFAULT, lambda_reg=1e-4, contrastive=1000.0),
    "code excerpt": ValenceObjective.preset("excerpt"),
}
CORE = tuple(VARIANTS)[:4]  # what every family is trained by
MEASURES = ("kl", "gap", "projected", "projected_teacher", "sentiment_shift")


def conditions(canonical: Objective, few: bool) -> dict[str, Objective]:
    """The canonical objective of a family and the variants of the other one, or a `few` of them."""
    return {CANONICAL: canonical, **{name: VARIANTS[name] for name in (CORE if few else VARIANTS)}}


def per_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the examples of each reader, seed, type and severity of `measure_valence`, and n_examples.

    sentiment_shift: of one example's rollout, the distance of its sentiment from that of the teacher's.
    """
    rows = rows.assign(sentiment_shift=(rows["sentiment"] - rows["sentiment_teacher"]).abs())
    groups = rows.groupby(["type", "severity", "reader", "seed"], sort=False)
    measures = ["kl", "gap", "projected", "projected_teacher", "sentiment", "sentiment_teacher", "sentiment_shift"]
    return groups[measures].mean().assign(n_examples=groups.size()).reset_index()


def summary(measured: pd.DataFrame) -> pd.DataFrame:
    """A row per family and reader, means over damaged types, with 95% t intervals over seeds.

    kl: nats a token; gap: |v_S - v_T|; ratio: projected valence over the teacher's; shift: `sentiment_shift`; and the
    differences of kl, gap, ratio and shift to the valence objective (`kl_less`, ...) and of gap to the canonical one
    (`gap_less_canonical`), paired within seeds.
    """
    damaged = measured[measured["type"] != NONE]
    rows = []
    for family, part in damaged.groupby("family", sort=False):
        means = part.groupby(["reader", "seed"], sort=False)[list(MEASURES)].mean()
        means = means.assign(ratio=means["projected"] / means["projected_teacher"], shift=means["sentiment_shift"])
        for reader in means.index.unique("reader"):
            own = means.loc[reader]
            row = {"family": family, "reader": reader}
            for name in ("kl", "gap", "ratio", "shift"):
                row |= stats.t_interval(own[name]).columns(name)
                less = stats.paired_interval(own[name], means.loc[VALENCE][name])
                row |= less.columns(f"{name}_less")
            less = stats.paired_interval(own["gap"], means.loc[CANONICAL]["gap"])
            rows.append(row | less.columns("gap_less_canonical") | {"n_seeds": len(own)})
    return pd.DataFrame(rows)


def effective_sequences(base: Base, config: TrainConfig, named: Mapping[str, Objective], batches: int) -> pd.Series:
    """The effective number of sequences, (sum w)^2 / sum w^2, of each condition: mean over the first `batches`.

    As training begins: a learned lambda moves. The weights depend on the teacher alone: any family will do.
    """
    trainer = Trainer(base, replace(config, objectives=tuple(named.values()), seeds=config.seeds[:1]), Path())
    with torch.no_grad():
        parts = [trainer.objective(trainer.forward(trainer.draw(step)))["effective"] for step in range(batches)]
    effective = torch.stack(parts).mean(0).tolist()
    return pd.Series(effective, list(named), name="effective").fillna(config.batch)  # the canonical one has no weights
