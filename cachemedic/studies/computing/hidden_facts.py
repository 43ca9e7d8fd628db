"""What notebook 23 asks: conversations about a long text in which facts are hidden.

Short passages state them. The text is cached before any question is known, and holds a passage of each of the kinds of
`data.chats`, so that one prefill serves as many questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cachemedic.core.seeds import generator
from cachemedic.corruption.spec import CorruptionEvent, CorruptionSpec, draw_event
from cachemedic.data.chats import KINDS, NAMES, question_of
from cachemedic.data.task_data import Row, TaskData, assemble

DEPTHS = (0.05, 0.35, 0.65, 0.95)  # of the passages, shares of the text
PLACE = "{text}"  # of the text in a conversation


@dataclass(frozen=True, eq=False)
class HiddenFacts:
    """A long text with passages.

    task: a question a row, all behind the same cached tokens. What is decoded is the question and the answer in the
    words of the passage, and the fact is what is scored. stated, bool [T]: the cached tokens of passages.
    """

    task: TaskData
    stated: Tensor

    def event(self, spec: CorruptionSpec, layers: int, heads: int) -> CorruptionEvent:
        """A fault as `spec` has it, which hits the tokens of all passages, too."""
        seed = int(self.task.seeds[0])
        event = draw_event(spec, (layers, heads, len(self.stated)), generator("hidden facts", spec.type, seed))
        return replace(event, time=event.time | self.stated)


def hidden_facts(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, seed: int, turn: int = 0
) -> HiddenFacts:
    """A text of `length` cached tokens from `documents`, in an order drawn for `seed`.

    turn: the passage of kind i lies at depth number i + turn, counted round. Raises `ValueError` for a tokenizer
    without a chat format, if the passages do not fit, and if the documents are too short.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{type(tokenizer).__name__} has no chat format; give a model that was trained on dialogues")
    rng = generator("hidden facts", length, seed)
    facts, passages = [], []
    for kind in KINDS:
        facts.append(kind.facts[_below(len(kind.facts), rng)])
        name = NAMES[_below(len(NAMES), rng)]
        passages.append(_encode(tokenizer, f"\n\n{kind.text.format(name=name, fact=facts[-1])}\n\n"))
    ids = _encode(tokenizer, _chat(tokenizer).partition(PLACE)[0])
    room = length - len(ids) - sum(map(len, passages))
    if room < 0:
        raise ValueError(f"{len(passages)} passages do not fit into {length} tokens: they take {length - room}")
    order = torch.randperm(len(documents), generator=rng).tolist()
    filler = _tokens(tokenizer, [documents[i] for i in order], room)
    places = [DEPTHS[(i + turn) % len(DEPTHS)] for i in range(len(KINDS))]
    stated, used = [False] * len(ids), 0
    for i in sorted(range(len(KINDS)), key=places.__getitem__):
        cut = round(places[i] * room)
        ids += filler[used:cut] + passages[i]
        stated += [False] * (cut - used) + [True] * len(passages[i])
        used = cut
    ids += filler[used:]
    stated += [False] * (room - used)
    rows = []
    for i, fact in enumerate(facts):
        words = KINDS[i].text.partition(" {fact}")[0].rpartition(". ")[2]
        asked = [*ids, *question_of(tokenizer, i), *_encode(tokenizer, words)]
        rows.append(Row([*asked, *_encode(tokenizer, f" {fact}")], cached=length, answer=len(asked)))
    task = replace(assemble("hidden facts", rows, [seed]), graded=True, depth=torch.tensor(places))
    return HiddenFacts(task, torch.tensor(stated))


def _chat(tokenizer: PreTrainedTokenizerBase) -> str:
    turn = [{"role": "user", "content": PLACE}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def _below(n: int, rng: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=rng))


def _encode(tokenizer: PreTrainedTokenizerBase, string: str) -> list[int]:
    return list(tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])


def _tokens(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], count: int) -> list[int]:
    """The first `count` tokens of the documents in turn."""
    found: list[int] = []
    for document in documents:
        found += _encode(tokenizer, document)
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"text too short: {count} tokens are needed, {len(documents)} documents hold {len(found)}")
