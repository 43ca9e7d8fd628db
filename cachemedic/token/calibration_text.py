"""Windows of text of several kinds, on which the model of a token is measured.

The kind of text matters more than its amount: a code describes badly what its calibration never saw, so that every kind
that is to be repaired belongs into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cachemedic.data.text import LABELS, documentation, sentiment_prompt, sentiment_review, source_code
from cachemedic.data.text_source import TextSource
from cachemedic.models.load import Base

REVIEWS = 2000
QUESTIONS = ("Explain this to a beginner.", "Summarise this in one sentence.", "What is missing here?", "Rewrite this.")

Texts = Sequence[str] | Mapping[str, Sequence[str]]


def default_texts(base: Base, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Documentation and code of installed packages, generated reviews, and both as a dialogue in the base's format."""
    rng = np.random.default_rng([seed, 17])
    prose = documentation("operator_train")
    drawn = [sentiment_review(rng) for _ in range(REVIEWS)]
    reviews = tuple(f"{sentiment_prompt(text)} {LABELS[label]}" for text, label in drawn)
    found = {"prose": prose, "code": source_code("operator_train"), "reviews": reviews}
    if base.tokenizer.chat_template:
        found["dialogue"] = dialogues(base, prose[: REVIEWS + 1])
    return found


def dialogues(base: Base, prose: Sequence[str]) -> tuple[str, ...]:
    """Each text with a question about it, in the chat format of a base, and the text after it as the answer."""
    asked = [f"{QUESTIONS[i % len(QUESTIONS)]}\n\n{text}" for i, text in enumerate(prose)]
    return tuple(_turns(base, question, answer) for question, answer in zip(asked, prose[1:], strict=False))


def source_texts(base: Base, source: TextSource) -> dict[str, Sequence[str]]:
    """The default texts of a base; documents of the source are a kind more, its reviews replace the generated ones."""
    found: dict[str, Sequence[str]] = dict(default_texts(base))
    if source.documents:
        found["articles"] = source.documents_of("calibration")
    if (reviews := source.reviews_of("calibration")) is not None:
        found["reviews"] = [f"{sentiment_prompt(text)} {LABELS[label]}" for text, label in reviews]
    return found


def _turns(base: Base, question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return str(base.tokenizer.apply_chat_template(turns, tokenize=False))


def held_out(texts: Texts, one_in: int = 8) -> tuple[dict[str, Sequence[str]], dict[str, Sequence[str]]]:
    """The texts of each kind without, and those that are, one in so many; a kind of fewer texts is in both.

    Raises `TypeError` for texts that are no strings.
    """
    kinds = by_kind(texts)
    few = {name for name, found in kinds.items() if len(found) < one_in}
    most = {name: k if name in few else [t for i, t in enumerate(k) if i % one_in] for name, k in kinds.items()}
    return most, {name: k if name in few else k[::one_in] for name, k in kinds.items()}


def by_kind(texts: Texts) -> Mapping[str, Sequence[str]]:
    """Texts as lists by kind. Raises `TypeError` for texts that are no strings."""
    kinds = texts if isinstance(texts, Mapping) else {"text": texts}
    for kind in kinds.values():
        if isinstance(kind, str) or not isinstance(kind, Sequence) or not all(isinstance(t, str) for t in kind):
            found = type(kind).__name__
            raise TypeError(f"texts must be a list of strings, or a dictionary of such lists by kind, not a {found}")
    return kinds


def windows(base: Base, texts: Texts, count: int, length: int, seed: int) -> Tensor:
    """Windows of `length` tokens [n, length] from the texts of each kind in equal numbers, `count` in all at most.

    Each begins as a text of this base does. A kind that is too short for its share gives as many windows as it has.
    Raises `TypeError` for texts that are no strings, `ValueError` if they make no window at all.
    """
    kinds = by_kind(texts)
    of_kinds = [
        _of_kind(base, kind, max(1, count // len(kinds)), length, [seed, number])
        for number, kind in enumerate(kinds.values())
    ]
    found = torch.cat(of_kinds) if of_kinds else torch.empty(0, length)
    if not len(found):
        raise ValueError(f"the texts make no window of {length} tokens, and two are needed at least: give more text")
    return found


def _of_kind(base: Base, texts: Sequence[str], count: int, length: int, seed: Sequence[int]) -> Tensor:
    tokenizer, stream = base.tokenizer, list[int]()
    end = tokenizer.eos_token_id
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    for i in np.random.default_rng(seed).permutation(len(texts)):
        stream += [*tokenizer(texts[i], add_special_tokens=False)["input_ids"], end]
        if len(stream) >= count * (length - 1):
            break
    count = min(count, len(stream) // (length - 1))
    rows = torch.tensor(stream[: count * (length - 1)], dtype=torch.long).view(count, length - 1)
    return torch.cat([torch.full((count, 1), start), rows], 1)
