"""How far a trained operator contracts the error, beside what maps of its kind could do at best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from cachemedic.core.seeds import generator
from cachemedic.corruption.apply import MIXTURE_WEIGHTS, corrupt
from cachemedic.corruption.severity import reach
from cachemedic.corruption.spec import CorruptionEvent, CorruptionSpec, draw_event
from cachemedic.corruption.types import ROTATION_SEED_TEST
from cachemedic.evaluation.bounds import best_linear_map, linear_bound, rank_floor
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.training.bank import Bank
from cachemedic.training.config import TrainConfig
from cachemedic.training.draws import Draw
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer

Cell = tuple[float, str]  # severity and type of faults


@dataclass(frozen=True, eq=False)
class _Tensor:
    """Keys or values of one layer, seed and cell: clean and corrupted, [B, G, T, d]."""

    clean: torch.Tensor
    corrupted: torch.Tensor

    @property
    def error(self) -> torch.Tensor:
        """The norm of the error."""
        return (self.corrupted - self.clean).norm()

    def left(self, m: torch.Tensor) -> torch.Tensor:
        """The norm of the error that the map I + m leaves."""
        x = self.corrupted.double()
        return (x + x @ m - self.clean).norm()


@torch.no_grad()
def measure_contraction(
    base: Base,
    config: TrainConfig,
    operators: Mapping[str, RepairOperator],
    bank: Bank,
    severities: Sequence[float] = (0.5,),
) -> pd.DataFrame:
    """rho of `operators` by condition, trained under `config`, one run a seed (whatever its objective).

    Measured on a held-out `bank`, with the faults of the config's setting. One row per severity, type, seed and
    condition; a type that does not reach a severity is taken as far as it goes, and one so mild that it leaves the
    keys or values of a protected layer as they are has no rho and is left out.
    rho: mean over samples and protected layers. For the same caches, and as means over layers, with maps that are
    fitted in hindsight: bound_rank, bound_full, the least rho of one linear map a layer for this type, of the
    operator's rank and of full rank; shared_rank, shared_full, what such a map leaves that is fitted to all types and
    severities at once (least squares, the error of each scaled to norm one), as a trained operator has to be.
    rank_floor: that of isotropic noise.
    """
    held_out = replace(config.bank, samples=len(bank))
    trainer = Trainer(base, replace(config, objectives=(RepairObjective(),), batch=1, bank=held_out), Path(), bank)
    layers = [layer - trainer.first for layer in config.layers]
    floor = rank_floor(config.rank, trainer.operator.head_dim)
    cells = [(severity, kind) for severity in severities for kind in MIXTURE_WEIGHTS]
    draws = {cell: _draw(base, config, bank, *cell, trainer.first) for cell in cells}
    places = range(len(config.seeds))
    draws = {cell: draw for cell, draw in draws.items() if _hit(bank, draw, places, layers, trainer.first)}
    rho = {}
    for condition, trainer.operator in operators.items():
        for cell, draw in draws.items():
            rho[condition, *cell] = trainer.forward(draw).rho.mean((1, 2)).tolist()
    results = []
    for place, seed in enumerate(config.seeds):
        tensors = {cell: _tensors(bank, draw, place, layers, trainer.first) for cell, draw in draws.items()}
        shared_rank, shared_full = (_shared(tensors, rank) for rank in (config.rank, None))
        for cell in draws:
            severity, kind = cell
            references = {
                "bound_rank": _bound(tensors[cell], config.rank),
                "bound_full": _bound(tensors[cell], None),
                "shared_rank": shared_rank[cell],
                "shared_full": shared_full[cell],
                "rank_floor": floor,
            }
            for condition in operators:
                row = {"severity": severity, "type": kind, "seed": seed, "condition": condition}
                results.append(row | {"rho": rho[condition, *cell][place]} | references)
    return pd.DataFrame(results)


def _draw(base: Base, config: TrainConfig, bank: Bank, severity: float, kind: str, first: int) -> Draw:
    """The bank with faults of one type, split into the seeds of `config`; layers from `first` on."""
    depth, heads, length = bank.keys.shape[1:4]
    shape = (depth, heads, length)
    layers = "all" if config.corrupted_layers == "all" else config.layers
    spec = CorruptionSpec(kind, min(severity, reach(kind, base.name, shape)), layers=layers, base=base.name)
    share = len(bank) // len(config.seeds)
    rows = torch.arange(share * len(config.seeds)).view(len(config.seeds), share)
    keys, values = [], []
    events: list[list[CorruptionEvent]] = []
    for seed, picked in zip(config.seeds, rows, strict=True):
        draws = generator("contraction", seed, kind)
        k, v = bank.keys[picked], bank.values[picked]
        drawn = [draw_event(spec, shape, draws) for _ in picked]
        k, v = corrupt(k, v, drawn, draws, k.roll(1, 0), v.roll(1, 0), ROTATION_SEED_TEST)
        keys.append(k[:, first:])
        values.append(v[:, first:])
        events.append([replace(e, layers=e.layers[first:], heads=e.heads[first:]) for e in drawn])
    return Draw(rows, torch.stack(keys), torch.stack(values), events)


def _tensors(bank: Bank, draw: Draw, place: int, layers: Sequence[int], first: int) -> list[tuple[_Tensor, _Tensor]]:
    """Keys and values of every protected layer, of the seed at `place`; `layers` count from `first`."""
    rows = draw.rows[place]
    pairs = ((bank.keys, draw.keys), (bank.values, draw.values))
    tensors = []
    for i in layers:
        key, value = (_Tensor(clean[rows, first + i], corrupted[place][:, i]) for clean, corrupted in pairs)
        tensors.append((key, value))
    return tensors


def _hit(bank: Bank, draw: Draw, places: Sequence[int], layers: Sequence[int], first: int) -> bool:
    """Whether faults leave an error in the keys and in the values of every protected layer, for every seed."""
    pairs = (pair for place in places for pair in _tensors(bank, draw, place, layers, first))
    return all(x.error > 0 for pair in pairs for x in pair)


def _bound(layers: Sequence[tuple[_Tensor, _Tensor]], rank: int | None) -> float:
    """Mean over layers of the least rho over keys and values, whose errors add up as norms."""
    bounds = []
    for pair in layers:
        left = sum(linear_bound(x.clean, x.corrupted, rank) * x.error for x in pair)
        bounds.append(float(left / sum(x.error for x in pair)))
    return sum(bounds) / len(bounds)


def _shared(tensors: dict[Cell, list[tuple[_Tensor, _Tensor]]], rank: int | None) -> dict[Cell, float]:
    """For each cell the rho, mean over layers, of one map a layer and tensor that is fitted to all cells."""
    depth = len(next(iter(tensors.values())))
    totals = dict.fromkeys(tensors, 0.0)
    for i in range(depth):
        maps = []
        for side in range(2):
            of_cells = [layers[i][side] for layers in tensors.values()]
            clean = torch.cat([x.clean / x.error for x in of_cells])
            maps.append(best_linear_map(clean, torch.cat([x.corrupted / x.error for x in of_cells]), rank))
        for cell, layers in tensors.items():
            left = sum(x.left(m) for x, m in zip(layers[i], maps, strict=True))
            totals[cell] += float(left / sum(x.error for x in layers[i])) / depth
    return totals
