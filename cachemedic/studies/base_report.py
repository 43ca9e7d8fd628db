"""What is known of a base model: its facts, how well it reads, and whether it really uses its context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
import torch.nn.functional as F

from cachemedic.core.files import read_sealed
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.types import NONE
from cachemedic.data.task_data import TaskData
from cachemedic.data.tasks import needle_task, perplexity_task
from cachemedic.data.text import documentation, text_hash
from cachemedic.data.text_source import EMBEDDED_TEXT, TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense, Reset
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.evaluation.experiments import standard_tasks
from cachemedic.evaluation.statistics import Interval, paired_interval, t_interval
from cachemedic.models.base_files import CARD
from cachemedic.models.load import EMBEDDED, WEIGHTS, Base
from cachemedic.models.shape import ModelShape

DIGITS = 16  # of a hash, for people to compare
BATCH = 16  # windows per forward pass
BLOCK = 64  # tokens; the short reading of a window sees the block before a token and what its own block has of it


@dataclass(frozen=True)
class Effort:
    """How much is measured: examples per seed of each task, windows by position, and tokens for the unigram."""

    perplexity: int = 24
    sentiment: int = 32
    needle: int = 25  # at each context length
    windows: int = 96  # in all
    unigram_tokens: int = 1_000_000
    contexts: tuple[int, ...] = (256, 384, 512)
    window: int = 512


@dataclass(frozen=True, eq=False)
class BaseReport:
    """All that is measured of one base; every frame has a column `base`.

    facts: what it is; scores: measure, estimate, low, high (95%); positions: NLL by position in a long window; needle:
    exact match by context length, depth and reader ("clean", or "erased" for a prefix that cannot be read).
    """

    facts: dict[str, Any]
    scores: pd.DataFrame
    positions: pd.DataFrame
    needle: pd.DataFrame


def measure(base: Base, seeds: Sequence[int], effort: Effort, source: TextSource = EMBEDDED_TEXT) -> BaseReport:
    """Everything about one base, on text that it was not trained on (of the embedded: on other packages)."""
    documents = source.documents_of("test")
    unigram = unigram_log_probabilities(base, source.documents_of("train"), effort.unigram_tokens)
    examples = {"perplexity": effort.perplexity, "sentiment": effort.sentiment}
    tasks = standard_tasks(base, "test", seeds, examples, source)
    needle = retrieval(base, documents, seeds, effort.needle, effort.contexts)
    scores = language_scores(base, tasks["perplexity"], unigram)
    for reader, rows in read(base, tasks["sentiment"]).groupby("reader"):
        scores[f"sentiment accuracy, {reader}"] = proportion(int(rows["correct"].sum()), len(rows))
    for reader, rows in needle.groupby("reader"):
        found, asked = rows["n_correct"].sum(), rows["n_examples"].sum()
        scores[f"needle exact match, {reader}"] = proportion(int(found), int(asked))
    table = [(name, score.estimate, score.low, score.high) for name, score in scores.items()]
    frames = [
        pd.DataFrame(table, columns=["measure", "estimate", "low", "high"]),
        nll_by_position(base, documents, effort.windows, effort.window),
        needle,
    ]
    for frame in frames:
        frame.insert(0, "base", base.name)
    return BaseReport(facts(base), *frames)


def facts(base: Base) -> dict[str, Any]:
    """Shape, size and origin of a base; what only a model card tells is None for a base without one."""
    config, shape = base.model.config, ModelShape.of(base.model.config)
    folder = WEIGHTS / base.name if base.name in EMBEDDED else Path(base.name)
    card = read_sealed(folder / CARD) if (folder / CARD).exists() else {}
    weights = folder / "model.safetensors"
    return {
        "architecture": config.model_type,
        "layers": shape.num_layers,
        "width": config.hidden_size,
        "query heads": shape.num_heads,
        "key/value heads": shape.num_kv_heads,
        "vocabulary": config.vocab_size,
        "context": base.context,
        "parameters": base.model.num_parameters(),
        "weights, MB": round(weights.stat().st_size / 1e6, 2) if weights.exists() else None,
        "weights, sha256": card.get("sha256", {}).get("model.safetensors", "")[:DIGITS] or None,
        "training steps": card.get("steps"),
        "training tokens": card.get("steps", 0) * card.get("tokens_per_step", 0) or None,
        "training packages": ", ".join(card.get("training_packages", [])) or None,
        "training text, sha256": card.get("training_text_sha256", "")[:DIGITS] or None,
        "training text on this machine": text_hash(documentation("train"))[:DIGITS],
        "licence": card.get("licence"),
    }


def read(base: Base, task: TaskData) -> pd.DataFrame:
    """Scores of a task on its clean cache and with the prefix erased (readers "clean" and "erased"), as `evaluate`."""
    readers: dict[str, Defense] = {"clean": NoDefense(), "erased": Reset()}
    return evaluate(base.model, task, clean_pass(base.model, task), CorruptionSpec(NONE), readers)


def unigram_log_probabilities(base: Base, documents: Sequence[str], tokens: int, seed: int = 0) -> torch.Tensor:
    """Log-probabilities [V] of single tokens, add-one smoothed, from `tokens` tokens of documents in random order."""
    ids: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(documents)):
        ids += base.tokenizer(documents[i], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            break
    counts = 1 + torch.bincount(torch.tensor(ids[:tokens]), minlength=base.config.vocab_size).double()
    return (counts / counts.sum()).log()


def language_scores(base: Base, task: TaskData, unigram: torch.Tensor) -> dict[str, Interval]:
    """How well text is predicted, with t intervals over seeds: perplexities (also of `unigram`, log-probabilities [V]),
    bits per byte, and the value of the context, the nats per token that erasing the prefix costs.
    """
    rows = pd.DataFrame({"seed": task.seeds.numpy(), "tokens": task.target_mask.sum(1).numpy()})
    for reader, scores in read(base, task).groupby("reader"):
        rows[reader] = scores["nll"].to_numpy() * rows["tokens"]
    rows["unigram"] = -(unigram[task.target_ids] * task.target_mask).sum(1).numpy()
    rows["bytes"] = scored_bytes(base, task)
    total = rows.groupby("seed").sum()
    nll = {name: total[name] / total["tokens"] for name in ("clean", "erased", "unigram")}
    return {
        "perplexity": _exponential(t_interval(nll["clean"])),
        "perplexity of the unigram": _exponential(t_interval(nll["unigram"])),
        "perplexity, prefix erased": _exponential(t_interval(nll["erased"])),
        "value of the context, nats per token": paired_interval(nll["erased"], nll["clean"]),
        "bits per byte": t_interval(total["clean"] / total["bytes"] / math.log(2)),
    }


def _exponential(interval: Interval) -> Interval:
    return Interval(math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high))


def scored_bytes(base: Base, task: TaskData) -> list[int]:
    """The bytes of text that the scored tokens of each example spell [N]; its scored tokens must be its last ones."""
    sizes = []
    for ids, scored in zip(_all_ids(task), task.target_mask.sum(1), strict=True):
        # decoded behind what comes before: some tokenizers drop a leading space
        before, whole = (str(base.tokenizer.decode(part)) for part in (ids[: -int(scored)], ids))
        sizes.append(len(whole.encode()) - len(before.encode()))
    return sizes


def _all_ids(task: TaskData) -> torch.Tensor:
    """Prefix, continuation and the token after it: [N, T + M + 1]."""
    return torch.cat([task.prefix_ids, task.continuation_ids, task.target_ids[:, -1:]], 1)


def retrieval(
    base: Base, documents: Sequence[str], seeds: Sequence[int], n: int, contexts: Sequence[int]
) -> pd.DataFrame:
    """Exact match of hidden facts: columns context, depth, reader, n_correct, n_examples, accuracy and its interval."""
    columns = ["context", "depth", "reader", "n_correct", "n_examples", "accuracy", "accuracy_low", "accuracy_high"]
    rows = []
    for context in contexts:
        scores = read(base, needle_task(base.tokenizer, documents, seeds, n, context))
        for (reader, depth), group in scores.groupby(["reader", "depth"]):
            correct, total = int(group["correct"].sum()), len(group)
            share = proportion(correct, total)
            rows.append((context, depth, reader, correct, total, share.estimate, share.low, share.high))
    return pd.DataFrame(rows, columns=columns)


def proportion(successes: int, trials: int) -> Interval:
    """A share with its 95% interval (Wilson 1927), which has a width even where all trials succeed."""
    bounds = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return Interval(successes / trials, float(bounds.low), float(bounds.high))


@torch.inference_mode()
def token_nll(base: Base, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of every token but the first: ids [N, T] -> [N, T - 1]."""
    losses = []
    for rows in ids.to(base.model.device).split(BATCH):
        logits = base.model(rows, attention_mask=torch.ones_like(rows), use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none").cpu())
    return torch.cat(losses)


def nll_by_position(base: Base, documents: Sequence[str], n: int, window: int) -> pd.DataFrame:
    """NLL by position in `n` windows, each from one document, read whole and read short.

    Read short, a token sees at most two blocks of `BLOCK` tokens, its own included. The tokens are the same, so that
    the difference is what the text further back tells. Columns position (middle of the block), nll, nll_short, saved
    and its 95% interval over windows, saved_low, saved_high; the first two blocks are not read short (NaN).
    Raises `ValueError` if `window` is no multiple of the block or the documents are too short.
    """
    if window % BLOCK or window <= 0:
        raise ValueError(f"window is {window}; allowed are multiples of {BLOCK}")
    task = perplexity_task(base.tokenizer, documents, n=n, prefix=1, scored=window - 1)
    ids = _all_ids(task)
    start, text = ids[:, :1], ids[:, 1:]  # [n, 1], [n, window]
    whole = token_nll(base, ids).unflatten(1, (-1, BLOCK)).mean(-1)  # [n, blocks]
    rows = []
    for block in range(window // BLOCK):
        nll = whole[:, block].numpy()
        row = {"position": (block + 0.5) * BLOCK, "nll": float(nll.mean())}
        if block >= 2:
            short = token_nll(base, torch.cat([start, text[:, (block - 1) * BLOCK : (block + 1) * BLOCK]], 1))
            nll_short = short[:, -BLOCK:].mean(1).numpy()
            saved = paired_interval(nll_short.tolist(), nll.tolist())
            row |= {"nll_short": float(nll_short.mean()), **saved.columns("saved")}
        rows.append(row)
    return pd.DataFrame(rows)
