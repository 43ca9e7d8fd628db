"""The clean pass of a task, and decoding of its continuations over any cache, in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from cachemedic.data.task_data import TaskData
from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.models.usable import check_mode

BATCH_BYTES = 512 * 2**20  # working memory of one batch: the cache with its copies, and the logits


@dataclass(frozen=True, eq=False)
class CleanBank:
    """The clean pass of a task: k, v [N, L, G, T, d] of the prefixes, logits [N, M, V] of the continuations.

    On the CPU, where corruption is drawn, so that the draws are the same on every device.
    """

    k: torch.Tensor
    v: torch.Tensor
    logits: torch.Tensor

    def tokens(self, task: TaskData, rows: slice | torch.Tensor = slice(None)) -> CachedTokens:
        """The cached tokens of the examples `rows` of the task."""
        return tokens_of(task.select(rows), self.k[rows], self.v[rows])


def tokens_of(task: TaskData, k: torch.Tensor, v: torch.Tensor) -> CachedTokens:
    """The prefixes of a task as the tokens of a cache k, v [N, L, G, T, d]."""
    return CachedTokens.behind_padding(k, v, task.prefix_ids, task.prefix_mask)


@torch.inference_mode()
def clean_pass(model: PreTrainedModel, task: TaskData) -> CleanBank:
    """Prefills the prefixes and decodes the continuations on the clean cache.

    Raises `ValueError` if prefix and continuation are longer than the model's context, and in training mode.
    """
    check_mode(model)
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
    return CleanBank(k, v, decode_logits(model, tokens_of(task, k, v), task))


@torch.inference_mode()
def decode_logits(
    model: PreTrainedModel, cache: CachedTokens, task: TaskData, defense: Defense | None = None
) -> torch.Tensor:
    """Decodes the continuations of `task` on the N rows of a cache that a defense has read: logits [N, M, V].

    Attention reads what is `readable`; every token keeps its position id. `defense` (None: none) acts inside attention;
    where it has R runs the rows are run-major: row run * N / R + i.
    """
    shape = (*task.continuation_ids.shape, model.config.get_text_config().vocab_size)
    logits = torch.empty(shape, dtype=model.dtype)
    defense = defense or Defense()
    for rows in batches(model, task, defense.runs):
        readable = None if cache.readable is None else cache.readable[rows]
        with defense.attach(model):
            logits[rows] = _decode_batch(model, cache.k[rows], cache.v[rows], task.select(rows), readable)
    return logits


def decode_through(
    model: PreTrainedModel, task: TaskData, defense: Defense, clean: CachedTokens, damaged: CachedTokens
) -> torch.Tensor:
    """The logits [N, M, V] of a model whose cache, written `clean` and found `damaged`, is read through a defense."""
    return decode_logits(model, defense.read(damaged, defense.write(clean)), task, defense)


def common_runs(defenses: Iterable[Defense]) -> int:
    """R of defenses that read one batch; `ValueError` if some have R > 1 and not all of these the same."""
    runs = {defense.runs for defense in defenses} - {1}
    if len(runs) > 1:
        raise ValueError(f"operators of {sorted(runs)} runs cannot read one batch; evaluate them apart")
    return max(runs, default=1)


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
    readable: torch.Tensor | None,
) -> torch.Tensor:
    """One forward pass over all continuations of `task`: logits [B, M, V], on the CPU."""
    readable = task.prefix_mask if readable is None else task.prefix_mask & readable
    decoded = torch.ones_like(task.continuation_ids)
    positions = task.prefix_mask.sum(1, keepdim=True) + decoded.cumsum(1) - 1
    output = model(
        input_ids=task.continuation_ids.to(model.device),
        attention_mask=torch.cat([readable.long(), decoded], dim=1).to(model.device),
        position_ids=positions.to(model.device),
        past_key_values=unstack_cache(k.to(model.device), v.to(model.device)),
    )
    return output.logits.cpu()
