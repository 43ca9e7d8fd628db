"""The forward pass of a training step: what the students read, what they say, and what objectives see of it.

A cache changes before it is read, in `read_cache` and by operators that repair stored tokens (`repaired`), or inside
attention, by `protect`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from cachemedic.corruption.types import NONE
from cachemedic.models.load import Base
from cachemedic.repair.attach import Protection, protect
from cachemedic.repair.operator import RepairOperator
from cachemedic.training.bank import Bank
from cachemedic.training.config import TrainConfig
from cachemedic.training.draws import Draw
from cachemedic.training.step_data import StepOutputs
from cachemedic.training.stored_repair import measure_repair, repair_read
from cachemedic.training.student import shared_prefix, starting_at
from cachemedic.training.valence.head import Valence
from cachemedic.training.valence.quantiser import KVQuantiser
from cachemedic.training.valence.rollouts import Observation, Read, observing
from cachemedic.training.valence.step import observe_step


@dataclass(frozen=True)
class Students:
    """The R students of a sweep: the frozen base, what is trained around it, and the clean caches that teach it."""

    base: Base
    config: TrainConfig
    bank: Bank
    operator: RepairOperator
    first: int  # layer
    quantiser: KVQuantiser | None = None
    valence: Valence | None = None
    strength: torch.Tensor | None = None  # [R] learned lambdas of the valence objective


def forward(students: Students, draw: Draw) -> StepOutputs:
    """The student pass of one step, all runs at once, and the terms of the repair."""
    base, config, bank, first = students.base, students.config, students.bank, students.first
    model, conditions = base.model, len(config.objectives)
    runs = draw.rows.repeat_interleave(conditions, 0)  # [R, B]
    found = read_cache(students, draw)
    read = repaired(students, draw, found)
    ids = bank.ids[runs.flatten(), bank.prefix :].to(model.device)
    positions = torch.arange(bank.prefix, bank.ids.shape[1], device=model.device).expand(len(ids), -1)
    hidden = bank.hidden[runs.flatten(), first].to(model.device, model.dtype)
    with (
        shared_prefix(model, read.keys.to(model.dtype), read.values.to(model.dtype), first, read.conditions),
        starting_at(model, first, hidden),
        protect(model, students.operator, record_gates=True) as protection,
        observing(model) if config.observes_valence else nullcontext(Observation()) as states,
    ):
        logits = model(ids, position_ids=positions, use_cache=False).logits
    if students.operator.repairs_tokens:
        terms = measure_repair(bank, config.layers, draw, found, read)
    else:
        terms = _inside_attention(students, draw, read, protection)
    untouched = [[e.type == NONE or e.severity == 0 for e in events] for events in draw.events]
    is_clean = torch.tensor(untouched, device=model.device).repeat_interleave(conditions, 0)
    outputs = StepOutputs(
        z_clean=bank.logits[runs].to(model.device),
        z_rep=logits.float().unflatten(0, (config.runs, -1)),
        identity=terms["identity"],
        rho=terms["rho"],
        is_clean=is_clean if students.quantiser is None else torch.zeros_like(is_clean),  # few bits are a fault
        is_corrupted=terms["found"] > 0,
        parameters=list(students.operator.parameters()),
        rho_by_side={"rho_k": terms["rho_k"], "rho_v": terms["rho_v"]},
    )
    if config.observes_valence:
        assert students.valence is not None  # `Trainer` sees to it
        sampled = max((o.tokens_sampled for o in config.valence_objectives), default=0)
        view = observe_step(base, bank, students.operator, read, draw, config.seeds, states, students.valence, sampled)
        view.strength = students.strength
        if students.quantiser is not None and config.learns_steps:
            view.steps = list(students.quantiser.parameters())
        outputs.valence = view
    return outputs


def read_cache(students: Students, draw: Draw) -> Read:
    """The caches as the students find them: corrupted, one for all runs of a seed, or of every run's own quantiser."""
    device, conditions = students.base.model.device, len(students.config.objectives)
    corrupted = draw.keys.to(device), draw.values.to(device)
    if students.quantiser is None:
        return Read(*corrupted, conditions, students.first)
    clean = [x[draw.rows].to(device) for x in (students.bank.keys, students.bank.values)]
    read = [
        # storage holds few bits; a fault replaces what it hits
        torch.where((sound == hit).repeat_interleave(conditions, 0), stored, hit.repeat_interleave(conditions, 0))
        for sound, hit, stored in zip(clean, corrupted, students.quantiser(*clean), strict=True)
    ]
    return Read(read[0], read[1], conditions=1, first=0)


def repaired(students: Students, draw: Draw, found: Read) -> Read:
    """The caches that the students attend to."""
    if students.operator.repairs_tokens and students.config.repairs:
        lossy = students.quantiser is not None
        return repair_read(students.base, students.bank, students.operator, draw, found, lossy)
    return found


def _inside_attention(students: Students, draw: Draw, read: Read, protection: Protection) -> dict[str, torch.Tensor]:
    """`identity`, `rho`, `rho_k`, `rho_v` and `found`, what was changed in the cache, of protected layers [R, B, P]."""
    config, bank = students.config, students.bank
    rows = draw.rows.repeat_interleave(len(read.keys) // len(draw.rows), 0)
    terms = []
    for layer in config.layers:
        clean_k, clean_v = (x[rows, layer].to(read.keys.device) for x in (bank.keys, bank.values))
        # detached: a quantiser would lower rho by doing more damage
        found_k, found_v = (x[:, :, layer - read.first].detach() for x in (read.keys, read.values))
        gate_k, gate_v = (
            None if gate is None else gate.unflatten(0, (config.runs, -1)) for gate in protection.gates[layer]
        )
        terms.append(students.operator.repair_terms(layer, (clean_k, clean_v), (found_k, found_v), (gate_k, gate_v)))
    return {name: torch.stack([of_layer[name] for of_layer in terms], -1) for name in terms[0]}
