"""How fast a sweep trains: from one run with everything computed anew at every step, up the ladder to all runs at once.

Every rung computes the same loss for the same draw; a rung changes only how.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from cachemedic.models.cache import stack_cache
from cachemedic.models.load import Base
from cachemedic.studies.bench.materialised_training import MaterialisedTrainer
from cachemedic.studies.bench.timing import interleave, median_ratio
from cachemedic.training.bank import Bank
from cachemedic.training.config import TrainConfig
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer

SETTINGS = {"standard": "all", "protected block": "protected"}  # name: corrupted layers
MID_BLOCK = (4, 5, 6, 7)
CONTRACTION_WEIGHTS = (0.0, 0.1, 0.5, 1.0)
ROUNDS = 9
SECONDS = 0.5  # of steps in a row, at least, that make one time


@dataclass(frozen=True)
class Rung:
    """One way to train: what is kept from the teacher, samples a run and step, and what is shared between runs."""

    name: str
    bank: bool = True  # else teacher and clean cache are computed at every step
    batch: int = 16
    skip: bool = True  # the layers below the first protected one, whose output the bank holds
    run_axis: bool = True  # else one run alone
    gram: bool = True  # fold and Gram matrices, else the repaired cache is formed


LADDER = (
    Rung("plain", bank=False, batch=1, skip=False, run_axis=False, gram=False),
    Rung("bank", batch=1, skip=False, run_axis=False, gram=False),
    Rung("batch", skip=False, run_axis=False, gram=False),
    Rung("first protected layer", run_axis=False, gram=False),
    Rung("run axis", gram=False),
    Rung("Gram space"),
)


@torch.no_grad()
def teacher_pass(base: Base, ids: torch.Tensor, prefix: int) -> Bank:
    """What the bank holds of the texts `ids` [N, T + M], computed now; the inputs of layers are left out."""
    cache = base.model(ids[:, :prefix], use_cache=True, logits_to_keep=1).past_key_values
    keys, values = stack_cache(cache)
    logits = base.model(ids[:, prefix:], past_key_values=cache).logits
    return Bank(keys, values, logits, hidden=torch.empty(len(ids), 1, 1, 0), ids=ids)


def sweep(setting: str, base: Base) -> TrainConfig:
    """The sweep that is timed: 5 seeds x 4 weights of the contraction term, family A of rank 8.

    "standard": faults on and repair of all layers; "protected block": both on four layers in the middle.
    """
    corrupted = SETTINGS[setting]
    layers = tuple(range(base.model.config.num_hidden_layers)) if corrupted == "all" else MID_BLOCK
    objectives = tuple(RepairObjective(lambda_contr=weight) for weight in CONTRACTION_WEIGHTS)
    return TrainConfig(layers=layers, corrupted_layers=corrupted, objectives=objectives)


def trainer_of(rung: Rung, base: Base, config: TrainConfig, bank: Bank) -> Trainer:
    """The trainer of one rung; `config` is the whole sweep, of which a rung without the run axis trains one run."""
    config = replace(config, batch=rung.batch)
    if not rung.run_axis:
        config = replace(config, seeds=config.seeds[:1], objectives=config.objectives[:1])
    folder = Path()  # a step writes nothing
    if rung.gram:
        return Trainer(base, config, folder, bank)
    return MaterialisedTrainer(base, config, folder, bank, rung.skip)


def _contender(rung: Rung, base: Base, config: TrainConfig, bank: Bank, seconds: float) -> Callable[[], float]:
    """Seconds a sample of this rung."""
    trainer = trainer_of(rung, base, config, bank)
    samples = trainer.config.runs * trainer.config.batch

    def steps() -> float:
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() < start + seconds:
            if not rung.bank:
                first = trainer.step * samples % len(bank)
                trainer.bank = teacher_pass(base, bank.ids[first : first + samples], bank.prefix)
            trainer.train_step()
            done += samples
        return (time.perf_counter() - start) / done

    return steps


def ladder(base: Base, bank: Bank, config: TrainConfig, rounds: int = ROUNDS, seconds: float = SECONDS) -> pd.DataFrame:
    """One row a rung. Columns rung, runs, batch, samples_per_second (of all its runs together), gain over the rung
    before, total gain over the first, both with the limits of a 95% interval, and rounds; all are medians over rounds.
    """
    rungs = [rung for rung in LADDER if rung.name != "first protected layer" or config.corrupted_layers == "protected"]
    contenders = {rung.name: _contender(rung, base, config, bank, seconds) for rung in rungs}
    times = interleave(contenders, rounds, f"training, faults on {config.corrupted_layers} layers")
    rows = []
    for before, rung in zip([rungs[0], *rungs], rungs, strict=False):
        gain, total = (median_ratio(times[slower.name], times[rung.name]) for slower in (before, rungs[0]))
        rows.append({
            "rung": rung.name,
            "runs": config.runs if rung.run_axis else 1,
            "batch": rung.batch,
            "samples_per_second": 1 / times[rung.name].median(),
            **gain.columns("gain"),
            **total.columns("total"),
            "rounds": rounds,
        })  # fmt: skip
    return pd.DataFrame(rows)


# What a step consists of, by the functions that do it.
PARTS = {
    "draw events": ("apply.py", "draw"),
    "corrupt": ("apply.py", "corrupt"),
    "student": ("modeling_gpt2.py", "forward"),
    "Gram matrices": ("gram.py", "of"),
    "Gram terms": ("gram.py", "layer_terms"),
    "loss": ("objective.py", "__call__"),
    "backward": ("_tensor.py", "backward"),
    "update": ("run_adam.py", "step"),
    "log records": ("log.py", "log_records"),
}


def step_parts(trainer: Trainer, steps: int = 20) -> pd.DataFrame:
    """Where the time of a step goes, by the profiler: columns part, milliseconds, share; the last row is the rest."""
    trainer.train_step()  # warms up
    profiler = cProfile.Profile()
    profiler.enable()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    total = time.perf_counter() - start
    profiler.disable()
    spent: dict[tuple[str, str], float] = {}  # the model's forward is the longest of several of that name
    for (file, _, name), (*_, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        function = Path(file).name, name
        spent[function] = max(cumulative, spent.get(function, 0.0))
    seconds = {part: spent.get(function, 0.0) for part, function in PARTS.items()}
    seconds["copies and the rest"] = total - sum(seconds.values())
    rows = [(part, 1e3 * s / steps, s / total) for part, s in seconds.items()]
    return pd.DataFrame(rows, columns=["part", "milliseconds", "share"])
