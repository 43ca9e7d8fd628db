"""Conversations about a short text that states one fact, which is then asked for.

The text is cached before the question is known, so that the answer has to be read from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from cachemedic.data.task_data import Row, TaskData, assemble

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Irene Jonas Kate Leon Maria Noah Olga Paul".split()


class Kind(NamedTuple):
    """A text with places for {name} and {fact}, what is asked, and the facts that it may state."""

    text: str
    question: str
    facts: tuple[str, ...]


KINDS = (
    Kind(
        "Minutes of the meeting. {name} opened the meeting and thanked everybody for coming. The budget was read and "
        "accepted without changes. The new printer has arrived and stands in the hall. The next meeting will be on "
        "{fact} in the same room. {name} will bring coffee. There were no further questions, and the meeting ended at "
        "noon.",
        "On which day is the next meeting?",
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ),
    Kind(
        "A parcel for {name} came this morning, and the neighbours took it in. It lies on the table beside the door. "
        "There are three books in it, wrapped in paper, and a lamp. Everything was packed in a {fact} box, which is "
        "not very heavy. {name} has to sign for it before Friday. If anything is broken, the shop will send it again.",
        "What colour is the box?",
        ("red", "blue", "green", "yellow", "black", "white", "orange", "purple"),
    ),
    Kind(
        "{name} grew up in a small village by the sea and learned to sail before learning to read. Last spring the "
        "family moved to {fact}, where {name} found work in a bakery. The flat is on the third floor, and the windows "
        "look over a park with old trees. On Sundays they walk along the river and talk about the boats at home.",
        "To which city did the family move?",
        ("London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Lisbon", "Dublin", "Prague", "Oslo"),
    ),
    Kind(
        "My neighbour {name} keeps many animals. There are hens in the garden, which lay more eggs than one person can "
        "eat. The favourite of all is a {fact}, which sleeps beside the stove and follows {name} to the shop. In the "
        "evening the children come by to feed it. In winter it is brushed every day, and it likes that very much.",
        "What kind of animal is the favourite?",
        ("dog", "cat", "goat", "pony", "rabbit", "sheep", "pig", "goose"),
    ),
)


def chat_task(tokenizer: PreTrainedTokenizerBase, seeds: Sequence[int] = (0,), n: int = 8) -> TaskData:
    """`n` conversations per seed, of every kind in turn: the text is cached, the fact is the answer that is scored.

    The question and what begins an answer are decoded. Raises `ValueError` for a tokenizer without a chat format.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{type(tokenizer).__name__} has no chat format; give a model that was trained on dialogues")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    rows = []
    for seed in seeds:
        rng = np.random.default_rng([seed, *b"chats"])
        for i in range(n):
            kind = KINDS[i % len(KINDS)]
            text = kind.text.format(name=rng.choice(NAMES), fact=(fact := str(rng.choice(kind.facts))))
            before, after = _format(tokenizer, text, kind.question)
            rows.append(Row(before + after + _encode(tokenizer, f"{fact}."), len(before), len(before) + len(after)))
    return assemble("chat", rows, seeds)


def question_of(tokenizer: PreTrainedTokenizerBase, example: int) -> list[int]:
    """The tokens that example number `example` of a seed decodes before it answers."""
    return _format(tokenizer, "", KINDS[example % len(KINDS)].question)[1]


def fact_in(answer: str, fact: str) -> bool:
    """Whether an answer names the fact, in small letters or capitals."""
    return fact.lower() in answer.lower()


def _format(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> tuple[list[int], list[int]]:
    """The tokens up to the end of the text, and those from there to where the answer begins."""
    turn: list[dict[str, Any]] = [{"role": "user", "content": f"{text}\n\n{question}"}]
    whole = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, asked, after = whole.partition(f"\n\n{question}")
    return _encode(tokenizer, before), _encode(tokenizer, asked + after)


def _encode(tokenizer: PreTrainedTokenizerBase, string: str) -> list[int]:
    return list(tokenizer(string, add_special_tokens=False)["input_ids"])
