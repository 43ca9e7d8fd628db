"""Valence behind a damaged cache: how far it moves, where the model goes on to, and what mood that is in.

v is dimension 0 of a valence head on the last hidden states (`cachemedic.training.valence.head`). The student is the
model behind the cache as a defense reads it, the teacher the same model behind the sound cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.evaluation.decoding import CleanBank, batches, common_runs, tokens_of
from cachemedic.evaluation.evaluate import corrupt_examples, divergence
from cachemedic.models.cache import unstack_cache
from cachemedic.training.valence.head import Valence
from cachemedic.training.valence.rollouts import observing, roll_out


@torch.inference_mode()
def measure_valence(
    model: PreTrainedModel,
    task: TaskData,
    clean: CleanBank,
    spec: CorruptionSpec,
    defenses: Mapping[str, Defense],
    valence: Valence,
    horizon: int,
) -> pd.DataFrame:
    """Valence under every defense, on the same damaged caches (those of `evaluate`): a row per defense and example.

    Columns reader, seed, example, type, severity, and
    kl: of the teacher's next-token distribution from the student's, nats, mean over the scored tokens of the text;
    gap: |v_S - v_T|, mean over the same tokens, teacher forced;
    projected, projected_teacher: mean v over `horizon` greedy steps (10 to 30) that each simulates from its own cache;
    sentiment, sentiment_teacher: the probability of positive, v, that the model gives what each wrote, read behind the
    sound cache, at the last step.

    Raises `ValueError` for another horizon, or examples that do not split into the runs of an operator.
    """
    if not 10 <= horizon <= 30:
        raise ValueError(f"horizon must be 10 to 30 steps, not {horizon}")
    seeds = pd.Series(task.seeds.numpy())
    examples = seeds.groupby(seeds).cumcount().to_numpy()
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in defenses}
    for rows in batches(model, task, common_runs(defenses.values())):
        part, index = task.select(rows), np.arange(len(task))[rows]
        k, v, _ = corrupt_examples(clean, task, spec, index)
        written, damaged = clean.tokens(task, rows), tokens_of(part, k, v)
        teacher = _futures(model, part, written, written, Defense(), valence, horizon)
        for name, defense in defenses.items():
            read = defense.read(damaged, defense.write(written))
            student = _futures(model, part, read, written, defense, valence, horizon)
            scored = part.target_mask
            off = (student["forced"] - teacher["forced"]).abs().masked_fill(~scored, 0).sum(1) / scored.sum(1)
            kl = divergence(part, teacher["logits"], student["logits"])
            values = {
                "kl": torch.from_numpy(kl),
                "gap": off,
                "projected": student["projected"],
                "projected_teacher": teacher["projected"],
                "sentiment": student["sentiment"],
                "sentiment_teacher": teacher["sentiment"],
            }
            frame = {"reader": name, "seed": seeds[index].to_numpy(), "example": examples[index]}
            frame |= {"type": spec.type, "severity": spec.severity or 0.0}
            frames[name].append(pd.DataFrame(frame | {key: x.numpy() for key, x in values.items()}, index=index))
    return pd.concat([pd.concat(parts).sort_index() for parts in frames.values()], ignore_index=True)


def _futures(
    model: PreTrainedModel,
    task: TaskData,
    read: CachedTokens,
    written: CachedTokens,
    defense: Defense,
    valence: Valence,
    horizon: int,
) -> dict[str, torch.Tensor]:
    """v behind the cache `read`: of the text, "forced" [N, M], and of what is written, "projected", "sentiment" [N].

    With the "logits" [N, M, V] of the text.
    """
    device = model.device
    start = task.prefix_mask.sum(1).to(device)
    sound = task.prefix_mask.to(device)
    readable = sound if read.readable is None else sound & read.readable.to(device)

    def feelings(hidden: torch.Tensor) -> torch.Tensor:
        return valence(hidden.float())[..., 0].cpu()

    def forced(cache: CachedTokens, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = torch.ones_like(ids)
        with observing(model) as observation:
            output = model(
                ids,
                attention_mask=torch.cat([mask.long(), decoded], 1),
                position_ids=start[:, None] + decoded.cumsum(1) - 1,
                past_key_values=unstack_cache(cache.k.to(device), cache.v.to(device)),
            )
        return feelings(observation.hidden[-1]), output.logits.cpu()

    first = task.continuation_ids[:, 0].to(device)
    with defense.attach(model):
        along, logits = forced(read, task.continuation_ids.to(device), readable)
        cache = unstack_cache(read.k.to(device), read.v.to(device))
        tokens, hidden = roll_out(model, first, start, horizon, None, cache, readable)
    judged = forced(written, torch.cat([first[:, None], tokens], 1), sound)[0][:, -1]
    return {"logits": logits, "forced": along, "projected": feelings(hidden).mean(1), "sentiment": judged}
