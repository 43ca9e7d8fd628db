"""The examples of a task as tensors, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class TaskData:
    """N examples of one task. Prefixes are padded on the left, continuations on the right (nothing scored reads that).

    prefix_ids, prefix_mask [N, T]: the cached tokens, and which of them are real;
    continuation_ids [N, M]: the tokens decoded on the cache; target_ids [N, M]: the token that follows each of them;
    target_mask [N, M]: the targets that count, every one of them predicted from a read of the cache;
    seeds [N]: the replicate that an example belongs to; depth [N]: where the asked fact lies in the prefix (needle);
    graded: whether an example is right or wrong; choices: the tokens that its answer is picked from (empty: all).
    """

    name: str
    prefix_ids: torch.Tensor
    prefix_mask: torch.Tensor
    continuation_ids: torch.Tensor
    target_ids: torch.Tensor
    target_mask: torch.Tensor
    seeds: torch.Tensor
    depth: torch.Tensor
    graded: bool = False
    choices: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prefix_ids)

    def select(self, rows: slice | torch.Tensor) -> TaskData:
        """The examples `rows` (a slice or indices), in that order."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {n: x[rows] if isinstance(x, torch.Tensor) else x for n, x in values.items()}
        return TaskData(**picked)


def score(task: TaskData, logits: torch.Tensor) -> dict[str, np.ndarray]:
    """Per-example scores of `logits` [N, M, V]: arrays [N].

    nll: mean negative log-likelihood (nats) over the example's scored tokens; n_tokens: their number; correct: 1 if the
    likeliest choice is the target at every scored position, 0 if not, NaN if the task is not graded. With the target
    answer fed, that is the exact match of the greedy answer: as long as each token was right, greedy decoding feeds the
    same tokens.
    """
    counts = task.target_mask.sum(1)
    losses = F.cross_entropy(logits.float().transpose(1, 2), task.target_ids, reduction="none")
    correct = torch.full((len(task),), torch.nan)
    if task.graded:
        if task.choices:
            choices = torch.tensor(task.choices, device=logits.device)
            picked = choices[logits[..., choices].argmax(-1)]
        else:
            picked = logits.argmax(-1)
        correct = ((picked == task.target_ids) | ~task.target_mask).all(1)
    nll = (losses * task.target_mask).sum(1) / counts
    return {"nll": nll.cpu().numpy(), "correct": correct.float().cpu().numpy(), "n_tokens": counts.cpu().numpy()}


@dataclass(frozen=True)
class Row:
    """One example: `ids`, of which the first `cached` are in the cache and those from `answer` on are scored."""

    ids: list[int]
    cached: int
    answer: int


def assemble(name: str, rows: list[Row], seeds: Sequence[int]) -> TaskData:
    """Pads examples, as many of each seed and seed-major, into one task (not graded)."""
    length, decoded = max(row.cached for row in rows), max(len(row.ids) - row.cached for row in rows)
    ids = torch.zeros(len(rows), length + decoded, dtype=torch.long)
    prefix_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    scored = torch.zeros(len(rows), length + decoded, dtype=torch.bool)
    for i, row in enumerate(rows):
        pad = length - row.cached
        ids[i, pad : pad + len(row.ids)] = torch.tensor(row.ids)
        prefix_mask[i, pad:] = True
        scored[i, pad + row.answer : pad + len(row.ids)] = True
    return TaskData(
        name=name,
        prefix_ids=ids[:, :length],
        prefix_mask=prefix_mask,
        continuation_ids=ids[:, length:-1],
        target_ids=ids[:, length + 1 :],
        target_mask=scored[:, length + 1 :],
        seeds=torch.tensor(seeds).repeat_interleave(len(rows) // len(seeds)),
        depth=torch.full((len(rows),), torch.nan),
    )
