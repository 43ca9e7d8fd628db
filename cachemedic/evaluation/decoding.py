"""The clean pass of a task, and decoding of its continuations over any cache, in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from cachemedic.data.task_data import TaskData
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.repair.attach import protect
from cachemedic.repair.operator import Reader

BATCH_BYTES = 512 * 2**20  # working memory of one batch: the cache with its copies, and the logits


@dataclass(frozen=True, eq=False)
class CleanBank:
    """The clean pass of a task: k, v [N, L, G, T, d] of the prefixes, logits [N, M, V] of the continuations.

    On the CPU, where corruption is drawn, so that the draws are the same on every device.
    """

    k: torch.Tensor
    v: torch.Tensor
    logits: torch.Tensor


@torch.inference_mode()
def clean_pass(model: PreTrainedModel, task: TaskData) -> CleanBank:
    """Prefills the prefixes and decodes the continuations on the clean cache.

    Raises `ValueError` if prefix and continuation are longer than the model's context.
    """
    length, decoded = task.prefix_ids.shape[1], task.continuation_ids.shape[1]
    context = model.config.get_text_config().max_position_embeddings
    if length + decoded > context:
        raise ValueError(
            f"the task has {length} cached and {decoded} decoded tokens, together {length + decoded}; the context of "
            f"the model is {context}"
        )
    parts = []
    for rows in batches(model, task, runs=1):
        mask = task.prefix_mask[rows].to(model.device)
        cache = DynamicCache()  # plain layers: sliding-window layers would drop old positions
        model.base_model(
            input_ids=task.prefix_ids[rows].to(model.device),
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
        )
        parts.append([x.cpu() for x in stack_cache(cache)])
    k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return CleanBank(k, v, decode_logits(model, k, v, task))


@torch.inference_mode()
def decode_logits(
    model: PreTrainedModel,
    k: torch.Tensor,
    v: torch.Tensor,
    task: TaskData,
    keep: torch.Tensor | None = None,
    operator: Reader | None = None,
) -> torch.Tensor:
    """Decodes the continuations of `task` on the cache k, v [N, L, G, T, d]: logits [N, M, V].

    keep [N, T]: the positions that attention may read (None: all); every token keeps its position id. With an operator
    of R runs the rows are run-major: row run * N / R + i.
    """
    shape = (*task.continuation_ids.shape, model.config.get_text_config().vocab_size)
    logits = torch.empty(shape, dtype=model.dtype)
    for rows in batches(model, task, operator.runs if operator else 1):
        readable = None if keep is None else keep[rows]
        reader = None if operator is None else operator.of_rows(rows)
        logits[rows] = _decode_batch(model, k[rows], v[rows], task.select(rows), readable, reader)
    return logits


def batches(model: PreTrainedModel, task: TaskData, runs: int) -> Iterator[slice | torch.Tensor]:
    """The rows of each batch, of at most about `BATCH_BYTES`: a slice for one run, else indices, run-major.

    A batch holds as many rows of every run. Raises `ValueError` if the examples do not split into `runs`.
    """
    if len(task) % runs:
        raise ValueError(f"{len(task)} examples do not split into {runs} runs")
    config = model.config.get_text_config()
    cached, decoded = task.prefix_ids.shape[1], task.continuation_ids.shape[1]
    caches = 8 * config.num_hidden_layers * config.hidden_size * cached  # k and v: clean, corrupted, read, joined
    row_bytes = model.dtype.itemsize * (caches + 4 * config.vocab_size * decoded)
    n = len(task) // runs
    step = max(1, BATCH_BYTES // row_bytes // runs)
    for start in range(0, n, step):
        stop = min(start + step, n)
        if runs == 1:
            yield slice(start, stop)  # indexing by it copies nothing
        else:
            yield (torch.arange(runs)[:, None] * n + torch.arange(start, stop)).flatten()


def _decode_batch(
    model: PreTrainedModel,
    k: torch.Tensor,
    v: torch.Tensor,
    task: TaskData,
    keep: torch.Tensor | None,
    operator: Reader | None,
) -> torch.Tensor:
    """One forward pass over all continuations of `task`: logits [B, M, V], on the CPU."""
    readable = task.prefix_mask if keep is None else task.prefix_mask & keep
    decoded = torch.ones_like(task.continuation_ids)
    positions = task.prefix_mask.sum(1, keepdim=True) + decoded.cumsum(1) - 1
    with protect(model, operator) if operator else nullcontext():
        output = model(
            input_ids=task.continuation_ids.to(model.device),
            attention_mask=torch.cat([readable.long(), decoded], dim=1).to(model.device),
            position_ids=positions.to(model.device),
            past_key_values=unstack_cache(k.to(model.device), v.to(model.device)),
        )
    return output.logits.cpu()
