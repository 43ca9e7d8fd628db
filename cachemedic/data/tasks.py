"""Evaluation tasks: language-model perplexity, prompted sentiment, continued mood, needle retrieval.

All four are one thing: a prefix that is prefilled clean and then corrupted in the cache, and a continuation that is
decoded, teacher forced, on the corrupted cache. What is asked of the model (the question, the `Sentiment:` prompt) is
in the continuation: the clean prefill knows nothing of it and cannot have stored the answer where no fault falls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cachemedic.core.errors import check_given
from cachemedic.data import text
from cachemedic.data.task_data import Row, TaskData, assemble


def perplexity_task(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    seeds: Sequence[int] = (0,),
    n: int = 32,
    prefix: int = 128,
    scored: int = 32,
) -> TaskData:
    """`n` windows per seed, of different documents as far as there are enough: `prefix` cached tokens, `scored` scored.

    One token lies between them: it is decoded on the cache and predicts the first scored one.
    Raises `ValueError` if the documents hold too few windows.
    """
    _check_positive(n=n, prefix=prefix, scored=scored)
    check_given("the tokenizer", tokenizer, PreTrainedTokenizerBase)
    if isinstance(documents, str):
        raise TypeError("documents must be a list of strings, not one string")
    rng, start, total = np.random.default_rng([*seeds, 1]), _start(tokenizer), n * len(seeds)
    needed = prefix + scored + 1 - len(start)
    windows: list[list[int]] = []
    further: list[list[int]] = []  # of documents that have given one
    for i in rng.permutation(len(documents)):
        ids = _encode(tokenizer, documents[i])
        parts = [ids[at : at + needed] for at in range(0, len(ids) - needed + 1, needed)]
        windows += parts[:1]
        further += parts[1:]
        if len(windows) == total:
            break
    windows += [further[i] for i in rng.permutation(len(further))[: total - len(windows)]]
    if len(windows) < total:
        raise ValueError(
            f"text too short: {n} windows of {needed} tokens for each of {len(seeds)} seeds are needed; "
            f"{len(documents)} documents hold {len(windows)}"
        )
    return assemble("perplexity", [Row([*start, *ids], prefix, answer=prefix + 1) for ids in windows], seeds)


def sentiment_task(
    tokenizer: PreTrainedTokenizerBase,
    seeds: Sequence[int] = (0,),
    n: int = 32,
    split: str = "test",
    reviews: Sequence[tuple[str, int]] | None = None,
) -> TaskData:
    """`n` prompts `Review: {x}\\nSentiment:` per seed; the label of higher log-probability wins.

    `reviews` are (text, label) pairs to draw from (0 negative, 1 positive); None generates them, other ones for every
    `split`. Labels of several tokens are compared at the first token in which they differ.
    Raises `ValueError` if there are fewer than `n` reviews per seed.
    """
    _check_positive(n=n)
    if reviews is None:
        drawn = [text.sentiment_review(rng) for rng in _generators(seeds, split) for _ in range(n)]
    elif len(reviews) < n * len(seeds):
        raise ValueError(f"{n} reviews for each of {len(seeds)} seeds are needed; {len(reviews)} are given")
    else:
        drawn = [reviews[i] for i in np.random.default_rng([*seeds, 2]).permutation(len(reviews))[: n * len(seeds)]]
    labels = [_encode(tokenizer, f" {label}") for label in text.LABELS]
    common = next(i for i, (a, b) in enumerate(zip(*labels, strict=False)) if a != b)
    rows = []
    for review, label in drawn:
        before, _, after = text.sentiment_prompt(review).rpartition("\n")
        prompt = [*_start(tokenizer), *_encode(tokenizer, f"{before}\n{after}")]
        asked = len(_encode(tokenizer, f"\n{after}"))
        ids = [*prompt, *labels[label][: common + 1]]
        rows.append(Row(ids, cached=len(prompt) - asked, answer=len(ids) - 1))
    task = assemble("sentiment", rows, seeds)
    return replace(task, graded=True, choices=tuple(label[common] for label in labels))


def mood_task(
    tokenizer: PreTrainedTokenizerBase,
    seeds: Sequence[int] = (0,),
    n: int = 32,
    split: str = "test",
    prefix: int = 96,
    scored: int = 16,
) -> TaskData:
    """`n` texts per seed of one mood each, negative and positive in turn: generated reviews of one label, joined.

    Of a text `prefix` tokens are cached and `scored` scored, one lies between them. What the cache says is the mood of
    what follows, so that damage to it can be seen in the valence. Every `split` has other reviews.
    """
    _check_positive(n=n, prefix=prefix, scored=scored)
    rows, needed = [], prefix + scored + 1
    for rng in _generators(seeds, f"mood {split}"):
        for example in range(n):
            ids = list(_start(tokenizer))
            while len(ids) < needed:
                review, label = text.sentiment_review(rng)
                ids += _encode(tokenizer, f"{review} ") if label == example % 2 else []
            rows.append(Row(ids[:needed], prefix, answer=prefix + 1))
    return assemble("mood", rows, seeds)


def needle_task(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    seeds: Sequence[int] = (0,),
    n: int = 32,
    context: int = 384,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    pairs: int = 4,
) -> TaskData:
    """`n` documents of `context` cached tokens per seed in which `pairs` name-value facts are hidden; one is asked for.

    The asked fact lies at one of the `depths` (shares of the context, in turn), the others anywhere. The answer is the
    value and its full stop. Raises `ValueError` if the facts do not fit or the text is too short.
    """
    _check_positive(n=n, context=context, pairs=pairs)
    if pairs > len(text.NAMES):
        raise ValueError(f"pairs is {pairs}; there are {len(text.NAMES)} names")
    if not depths or min(depths) < 0 or max(depths) > 1:
        raise ValueError(f"depths are {tuple(depths)}; they must be shares of the context in [0, 1]")
    start, rows, where = _start(tokenizer), [], []
    filler = _token_stream(tokenizer, documents, np.random.default_rng([*seeds, 3]))
    for rng in _generators(seeds, "needle"):
        for example in range(n):
            names = rng.choice(text.NAMES, pairs, replace=False)
            values = [text.needle_value(rng) for _ in names]
            facts = [_encode_fact(tokenizer, *fact) for fact in zip(names, values, strict=True)]
            room = context - len(start) - sum(map(len, facts))
            if room < 0:
                raise ValueError(f"{pairs} facts do not fit into a context of {context} tokens")
            depth = depths[example % len(depths)]
            cuts = np.array([round(depth * room), *rng.integers(0, room + 1, pairs - 1)])
            ids, used = list(start), 0
            for i in np.argsort(cuts, kind="stable"):
                ids += [next(filler) for _ in range(cuts[i] - used)] + facts[i]
                used = cuts[i]
            ids += [next(filler) for _ in range(room - used)]
            prompt = ids + _encode(tokenizer, text.needle_question(names[0]))
            rows.append(Row(prompt + _encode_value(tokenizer, values[0]), cached=context, answer=len(prompt)))
            where.append(depth)
    return replace(assemble("needle", rows, seeds), graded=True, depth=torch.tensor(where))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _generators(seeds: Sequence[int], stream: str) -> list[np.random.Generator]:
    """One generator per seed; different `stream`s (a split, a task) share no draws."""
    return [np.random.default_rng([seed, *stream.encode()]) for seed in seeds]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that begins every text."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if start is None else [start]


def _encode(tokenizer: PreTrainedTokenizerBase, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]  # windows are cut from long texts


def _encode_value(tokenizer: PreTrainedTokenizerBase, value: str) -> list[int]:
    words = [i for word in value.split() for i in _encode(tokenizer, f" {word}")]
    return words + _encode(tokenizer, ".")


def _encode_fact(tokenizer: PreTrainedTokenizerBase, name: str, value: str) -> list[int]:
    before, _, _ = text.needle_fact(name, "|").partition(" |")
    return _encode(tokenizer, before) + _encode_value(tokenizer, value)


def _token_stream(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], rng: np.random.Generator
) -> Iterator[int]:
    """The tokens of all documents once, in a random order; the token that begins a text stands between them."""
    used = 0
    for i in rng.permutation(len(documents)):
        for token in _encode(tokenizer, documents[i]) + _start(tokenizer):
            used += 1
            yield token
    raise ValueError(f"text too short: the examples need more than the {used} tokens of {len(documents)} documents")
