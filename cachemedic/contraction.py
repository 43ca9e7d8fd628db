"""How far a trained operator contracts the error, beside what any map of its kind could do at best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from cachemedic.bank import Bank
from cachemedic.bounds import linear_bound, rank_floor
from cachemedic.corruption import MIXTURE_WEIGHTS, corrupt
from cachemedic.corruption_spec import CorruptionSpec, draw_event
from cachemedic.corruption_types import ROTATION_SEED_TEST
from cachemedic.models import Base
from cachemedic.operators import RepairOperator
from cachemedic.severity import reach
from cachemedic.train import Draw, Trainer, generator
from cachemedic.train_config import TrainConfig


@torch.no_grad()
def measure_contraction(
    base: Base, config: TrainConfig, operator: RepairOperator, bank: Bank, severity: float = 0.5
) -> pd.DataFrame:
    """rho of `operator`, trained under `config`, on a held-out `bank`, with the faults of the config's setting.

    One row per type and seed. rho: mean over samples and protected layers. bound_rank, bound_full: for the same caches,
    the least rho of one linear map a layer, of its rank and of full rank. rank_floor: that of isotropic noise.
    Types that do not reach `severity` are taken as far as they go.
    """
    trainer = Trainer(base, replace(config, batch=1, bank=replace(config.bank, samples=len(bank))), Path(), bank)
    trainer.operator = operator
    depth, heads, length = bank.keys.shape[1:4]
    shape = (depth, heads, length)
    share = len(bank) // len(config.seeds)
    layers = "all" if config.corrupted_layers == "all" else config.layers
    rows = torch.arange(share * len(config.seeds)).view(len(config.seeds), share)
    results = []
    for kind in MIXTURE_WEIGHTS:
        spec = CorruptionSpec(kind, min(severity, reach(kind, base.name, shape)), layers=layers, base=base.name)
        keys, values, events = [], [], []
        for seed, picked in zip(config.seeds, rows, strict=True):
            draws = generator("contraction", seed, kind)
            k, v = bank.keys[picked], bank.values[picked]
            drawn = [draw_event(spec, shape, draws) for _ in picked]
            k, v = corrupt(k, v, drawn, draws, k.roll(1, 0), v.roll(1, 0), ROTATION_SEED_TEST)
            keys.append(k[:, trainer.first :])
            values.append(v[:, trainer.first :])
            events.append(drawn)
        draw = Draw(rows, torch.stack(keys), torch.stack(values), events)
        outputs, _ = trainer.forward(draw)
        rho = outputs.rho.mean((1, 2))
        for run, value in enumerate(rho.tolist()):
            seed = run // len(config.objectives)
            clean = bank.keys[rows[seed]], bank.values[rows[seed]]
            corrupted = draw.keys[seed], draw.values[seed]
            row = {"type": kind, "seed": config.seeds[seed], "condition": run % len(config.objectives), "rho": value}
            for name, rank in (("bound_rank", config.rank), ("bound_full", None)):
                row[name] = _bound(clean, corrupted, config.layers, trainer.first, rank)
            results.append(row | {"rank_floor": rank_floor(config.rank, operator.head_dim)})
    return pd.DataFrame(results)


def _bound(
    clean: tuple[torch.Tensor, ...], corrupted: tuple[torch.Tensor, ...], layers: tuple[int, ...], first: int,
    rank: int | None,
) -> float:  # fmt: skip
    """Mean over layers of the least rho over keys and values, whose errors add up as norms."""
    bounds = []
    for layer in layers:
        pairs = [(x[:, layer], y[:, layer - first]) for x, y in zip(clean, corrupted, strict=True)]
        norms = [(y - x).norm() for x, y in pairs]
        left = [linear_bound(x, y, rank) * norm for (x, y), norm in zip(pairs, norms, strict=True)]
        bounds.append(float(sum(left) / sum(norms)))
    return sum(bounds) / len(bounds)
