"""What the valence objective sees of a training step beyond the repair: states, futures and sampled sequences."""

from __future__ import annotations

from dataclasses import replace

import torch

from cachemedic.core.seeds import generator
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.training.bank import Bank
from cachemedic.training.draws import Draw
from cachemedic.training.step_data import ValenceStep
from cachemedic.training.valence.head import Valence
from cachemedic.training.valence.rollouts import Observation, Read, decode, observing, reading, roll_out


def observe_step(
    base: Base,
    bank: Bank,
    operator: RepairOperator,
    read: Read,
    draw: Draw,
    seeds: tuple[int, ...],
    student: Observation,
    valence: Valence,
    sampled: int,
) -> ValenceStep:
    """The valence objective's view of a step whose student pass left the observation `student`.

    One pass of the teacher over its clean cache; with `sampled` tokens, the student's own continuations besides, scored
    by both. Runs of one seed sample by the same noise.
    """
    model, device = base.model, base.model.device
    runs = operator.runs
    conditions = runs // len(seeds)
    clean = Read.clean(bank, draw.rows, device)
    ids = bank.ids[draw.rows.flatten(), bank.prefix :].to(device)
    with torch.no_grad(), reading(model, clean, None), observing(model) as teacher:
        decode(model, ids, bank.prefix)

    def by_run(states: list[torch.Tensor], rows: int) -> torch.Tensor:  # -> [R, B, L, M, width]
        stacked = torch.stack(states, 1).float().unflatten(0, (rows, -1))
        return stacked.repeat_interleave(runs // rows, 0)

    hidden_clean, attention_clean = (by_run(x, len(seeds)) for x in (teacher.hidden, teacher.attention))
    hidden_rep, attention_rep = (by_run(x, runs) for x in (student.hidden, student.attention))
    followers = bank.ids[draw.rows, bank.prefix + 1 :].to(device)
    batch = draw.rows.shape[1]
    order = torch.stack([torch.randperm(batch, generator=generator("shuffle", seed, draw.step)) for seed in seeds])
    step = ValenceStep(
        hidden_clean=hidden_clean,
        hidden_rep=hidden_rep,
        attention_clean=attention_clean,
        attention_rep=attention_rep,
        future_clean=valence(hidden_clean[:, :, -1]),
        future_rep=valence(hidden_rep[:, :, -1]),
        targets=followers.repeat_interleave(conditions, 0),
        order=order.repeat_interleave(conditions, 0).to(device),
    )
    if sampled:
        noise = [torch.rand(batch, sampled, generator=generator("samples", seed, draw.step)) for seed in seeds]
        own = torch.stack(noise).repeat_interleave(conditions, 0).flatten(0, 1).to(device)
        first = ids[:, 0].unflatten(0, (len(seeds), -1)).repeat_interleave(conditions, 0).flatten()
        with reading(model, read, operator):
            tokens, _ = roll_out(model, first, bank.prefix, sampled, own)
            fed = torch.cat([first[:, None], tokens[:, :-1]], 1)
            step.sampled_rep = _log_p(decode(model, fed, bank.prefix), tokens, runs)
        with torch.no_grad(), reading(model, replace(clean, conditions=conditions), None):
            step.sampled_clean = _log_p(decode(model, fed, bank.prefix), tokens, runs)
    return step


def _log_p(logits: torch.Tensor, tokens: torch.Tensor, runs: int) -> torch.Tensor:
    """Log-probabilities [R, B, n] of tokens [R*B, n] under logits [R*B, n, V]."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).unflatten(0, (runs, -1))
