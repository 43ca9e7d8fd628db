"""The projected future valence of students and of their teacher, by which the mercy gate judges."""

from __future__ import annotations

from dataclasses import replace

import torch

from cachemedic.core.seeds import generator
from cachemedic.training.draws import draw_step
from cachemedic.training.forward import Students, read_cache, repaired
from cachemedic.training.step_data import StepOutputs
from cachemedic.training.valence.gate import PROXY, MercyGate
from cachemedic.training.valence.rollouts import Read, reading, roll_out

PROBE_STEP = -1  # a step of its own: the probe batch is the same at every check


@torch.no_grad()
def project(students: Students, gate: MercyGate) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean valence of the students [R] and of the teacher [R] over the next steps that each simulates from the probe.

    A student continues behind its corrupted and repaired cache, the teacher behind the clean one.
    """
    config, bank, model = students.config, students.bank, students.base.model
    valence = students.valence
    assert valence is not None  # `Trainer` sees to it
    conditions, seeds = len(config.objectives), config.seeds
    draw = draw_step(replace(config, batch=gate.probe), bank, students.first, PROBE_STEP)
    clean = Read.clean(bank, draw.rows, model.device)
    first = bank.ids[draw.rows, bank.prefix].to(model.device)  # [S, B]
    noise = torch.stack([torch.rand(gate.probe, gate.horizon, generator=generator("probe", seed)) for seed in seeds])

    def mean_valence(start: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        sampling = None if gate.greedy else own.flatten(0, 1).to(model.device)
        _, hidden = roll_out(model, start.flatten(), bank.prefix, gate.horizon, sampling)
        return valence(hidden.float())[..., 0].unflatten(0, (len(start), -1)).mean((1, 2))

    with reading(model, clean, None):
        baseline = mean_valence(first, noise)
    with reading(model, repaired(students, draw, read_cache(students, draw)), students.operator):
        projected = mean_valence(*(x.repeat_interleave(conditions, 0) for x in (first, noise)))
    return projected, baseline.repeat_interleave(conditions, 0)


def proxy(outputs: StepOutputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The cheap one: 0.95 times the mean valence of the students' batch [R], and the teacher's on the same [R]."""
    assert outputs.valence is not None  # by the configuration
    student, teacher = (
        x[..., 0].detach().mean((1, 2)) for x in (outputs.valence.future_rep, outputs.valence.future_clean)
    )
    return PROXY * student, teacher
