"""How fast a sweep trains: from one run with everything computed anew at every step, up the ladder to all runs at once.

Every rung computes the same loss for the same draw; a rung changes only how.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from transformers.cache_utils import Cache

from cachemedic.attention import protect
from cachemedic.bank import Bank
from cachemedic.bench.materialised import PresetLayer, materialised
from cachemedic.bench.timing import interleave, median_ratio
from cachemedic.cache import stack_cache
from cachemedic.corruption_types import NONE
from cachemedic.families import FoldedOperator
from cachemedic.models import Base
from cachemedic.objective import EPS, RepairObjective, StepOutputs
from cachemedic.student import starting_at
from cachemedic.train import Draw, Trainer, TrainConfig

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


class MaterialisedTrainer(Trainer):
    """A trainer that forms the repaired cache of every run: the student reads it, and the regularisers measure it.

    For M = 1 decoded token and models without grouped heads. Without `skip` the student passes through all layers.
    """

    def __init__(self, base: Base, config: TrainConfig, folder: Path, bank: Bank, skip: bool) -> None:
        super().__init__(base, config, folder, bank)
        assert isinstance(self.operator, FoldedOperator)
        self.operator = materialised(self.operator)
        self.optimizer = torch.optim.Adam(self.operator.parameters(), lr=config.lr)
        if not skip:
            self.first = 0

    def forward(self, draw: Draw) -> tuple[StepOutputs, dict[str, torch.Tensor]]:
        """See `Trainer.forward`."""
        config, bank, model, operator = self.config, self.bank, self.base.model, self.operator
        conditions = len(config.objectives)

        def by_run(x: torch.Tensor) -> torch.Tensor:  # [S, B, ...] -> [R*B, ...]
            return x.repeat_interleave(conditions, 0).flatten(0, 1)

        rows = by_run(draw.rows)
        keys, values = by_run(draw.keys), by_run(draw.values)
        # layers below the first are skipped: any tensor of the prefix's length stands for theirs
        stored = [max(layer - self.first, 0) for layer in range(model.config.num_hidden_layers)]
        cache = Cache([PresetLayer(keys[:, i], values[:, i]) for i in stored])
        positions = torch.full((len(rows), 1), bank.prefix)
        with starting_at(model, self.first, bank.hidden[rows, self.first]), protect(model, operator):
            logits = model(bank.ids[rows][:, bank.prefix :], past_key_values=cache, position_ids=positions).logits
        terms = []
        for layer in config.layers:
            clean = [by_run(x[:, layer][draw.rows]) for x in (bank.keys, bank.values)]
            corrupted = [x[:, layer - self.first] for x in (keys, values)]
            read = [x[:, :, : bank.prefix] for x in operator.repaired[layer]]
            terms.append(_layer_terms(clean, corrupted, read))
        stacked = {name: torch.stack([t[name] for t in terms], -1).unflatten(0, (config.runs, -1)) for name in terms[0]}
        clean_event = torch.tensor([[event.type == NONE for event in events] for events in draw.events])
        outputs = StepOutputs(
            z_clean=bank.logits[rows].unflatten(0, (config.runs, -1)),
            z_rep=logits.unflatten(0, (config.runs, -1)),
            identity=stacked["identity"],
            rho=stacked["rho"],
            is_clean=clean_event.repeat_interleave(conditions, 0),
            is_corrupted=stacked["found"] > 0,
            parameters=list(operator.parameters()),
        )
        return outputs, stacked


def _layer_terms(
    clean: list[torch.Tensor], corrupted: list[torch.Tensor], repaired: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The terms of one layer, [R*B] each, from its keys and values [R*B, H, T, d] in three states."""

    def squares(tensors: list[torch.Tensor], reference: list[torch.Tensor] | None = None) -> torch.Tensor:  # [2, R*B]
        away = tensors if reference is None else [x - y for x, y in zip(tensors, reference, strict=True)]
        return torch.stack([x.flatten(1).square().sum(1) for x in away])

    left, found, size = squares(repaired, clean), squares(corrupted, clean), squares(clean)
    # a floor under the root: its gradient at zero is infinite
    left_root, found_root = left.clamp_min(1e-12).sqrt(), found.sqrt()
    rho_k, rho_v = left_root / (found_root + EPS)
    return {
        "identity": left.sum(0) / (size.sum(0) + EPS),
        "rho": left_root.sum(0) / (found_root.sum(0) + EPS),
        "rho_k": rho_k,
        "rho_v": rho_v,
        "found": found.sum(0),
    }


def trainer_of(rung: Rung, base: Base, config: TrainConfig, bank: Bank) -> Trainer:
    """The trainer of one rung; `config` is the whole sweep, of which a rung without the run axis trains one run."""
    config = replace(config, batch=rung.batch)
    if not rung.run_axis:
        config = replace(config, seeds=config.seeds[:1], objectives=config.objectives[:1])
    folder = Path()  # steps alone write nothing
    return Trainer(base, config, folder, bank) if rung.gram else MaterialisedTrainer(base, config, folder, bank, rung.skip)


def _contender(rung: Rung, base: Base, config: TrainConfig, bank: Bank, seconds: float) -> Callable[[], float]:
    """Seconds a sample of this rung."""
    trainer = trainer_of(rung, base, config, bank)
    samples = trainer.config.runs * trainer.config.batch

    def steps() -> float:
        start, done = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            if not rung.bank:
                first = trainer.step * samples % len(bank)
                trainer.bank = teacher_pass(base, bank.ids[first : first + samples], bank.prefix)
            trainer.train_step()
            done += samples
        return (time.perf_counter() - start) / done

    return steps


def sweep(corrupted_layers: str, bank: Bank) -> TrainConfig:
    """The sweep that is timed: 5 seeds x 4 weights of the contraction term, family A of rank 8.

    "protected": faults and repair on a block of four layers in the middle; "all": both on all layers.
    """
    layers = MID_BLOCK if corrupted_layers == "protected" else tuple(range(bank.keys.shape[1]))
    objectives = tuple(RepairObjective(lambda_contr=weight) for weight in CONTRACTION_WEIGHTS)
    return TrainConfig(layers=layers, corrupted_layers=corrupted_layers, objectives=objectives)


def ladder(base: Base, bank: Bank, config: TrainConfig, rounds: int = ROUNDS, seconds: float = SECONDS) -> pd.DataFrame:
    """One row a rung, the samples of all its runs counted: columns setting, rung, runs, batch, samples_per_second
    (median), gain over the rung before, total over the first; both with the limits of a 95% interval, rounds.
    """
    rungs = [rung for rung in LADDER if rung.name != "first protected layer" or config.corrupted_layers == "protected"]
    contenders = {rung.name: _contender(rung, base, config, bank, seconds) for rung in rungs}
    times = interleave(contenders, rounds, f"training, faults on {config.corrupted_layers} layers")
    rows = []
    for before, rung in zip([rungs[0], *rungs], rungs, strict=False):
        gain, total = (median_ratio(times[slower.name], times[rung.name]) for slower in (before, rungs[0]))
        rows.append({
            "setting": config.corrupted_layers,
            "rung": rung.name,
            "runs": config.runs if rung.run_axis else 1,
            "batch": rung.batch,
            "samples_per_second": 1 / times[rung.name].median(),
            "gain": gain.estimate,
            "gain_low": gain.low,
            "gain_high": gain.high,
            "total": total.estimate,
            "total_low": total.low,
            "total_high": total.high,
            "rounds": rounds,
        })  # fmt: skip
    return pd.DataFrame(rows)

