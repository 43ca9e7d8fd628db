"""The projected future valence of students and of their teacher, by which the mercy gate judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from cachemedic.core.seeds import generator
from cachemedic.training.draws import Draw, draw_step
from cachemedic.training.forward import Students, read_cache, repaired
from cachemedic.training.valence.gate import PROXY, MercyGate, Projection
from cachemedic.training.valence.rollouts import Read, decode, observing, reading, roll_out

PROBE_STEP = -1  # a step of its own: the probe batch is the same at every check


def projection(students: Students, gate: MercyGate, batch: Draw) -> Projection:
    """What `gate` judges by, of students that have just been updated on `batch`."""
    return proxy(students, batch) if gate.projection == "proxy" else project(students, gate)


def project(students: Students, gate: MercyGate) -> Projection:
    """Mean valence of the students [R] and of the teacher [R] over the next steps that each simulates from the probe.

    A student continues behind its corrupted and repaired cache, the teacher behind the clean one.
    """
    config, bank, model = students.config, students.bank, students.base.model
    draw = draw_step(replace(config, batch=gate.probe), bank, students.first, PROBE_STEP, students.base.severity_map)
    first = bank.ids[draw.rows, bank.prefix].to(model.device)  # [S, B]
    noise = [torch.rand(gate.probe, gate.horizon, generator=generator("probe", seed)) for seed in config.seeds]
    own = torch.stack(noise).to(model.device)

    def simulate(runs_of_a_seed: int) -> torch.Tensor:
        start, u = (x.repeat_interleave(runs_of_a_seed, 0).flatten(0, 1) for x in (first, own))
        return roll_out(model, start, bank.prefix, gate.horizon, None if gate.greedy else u)[1]

    return _behind_both_caches(students, draw, simulate)


def proxy(students: Students, batch: Draw) -> Projection:
    """The cheap one: 0.95 times the mean valence of the students over the tokens of `batch` [R]; the teacher's [R]."""
    bank, model = students.bank, students.base.model
    ids = bank.ids[batch.rows, bank.prefix :].to(model.device)  # [S, B, M]

    def read_on(runs_of_a_seed: int) -> torch.Tensor:
        with observing(model) as observation:
            decode(model, ids.repeat_interleave(runs_of_a_seed, 0).flatten(0, 1), bank.prefix)
        return observation.hidden[-1]

    student, teacher = _behind_both_caches(students, batch, read_on)
    return PROXY * student, teacher


@torch.no_grad()
def _behind_both_caches(students: Students, draw: Draw, states: Callable[[int], torch.Tensor]) -> Projection:
    """Mean valence of last hidden states behind the repaired caches of `draw` [R], and behind the clean ones [R].

    states: for a number of runs a seed, the states [rows, steps, width] of what is read or decoded behind a cache.
    """
    model, valence, conditions = students.base.model, students.valence, len(students.config.objectives)
    assert valence is not None  # `Trainer` sees to it

    def mean_valence(runs_of_a_seed: int) -> torch.Tensor:
        predicted = valence(states(runs_of_a_seed).float())[..., 0]
        return predicted.unflatten(0, (len(draw.rows) * runs_of_a_seed, -1)).mean((1, 2))

    with reading(model, Read.clean(students.bank, draw.rows, model.device), None):
        teacher = mean_valence(1)
    with reading(model, repaired(students, draw, read_cache(students, draw)), students.operator):
        student = mean_valence(conditions)
    return student, teacher.repeat_interleave(conditions, 0)
