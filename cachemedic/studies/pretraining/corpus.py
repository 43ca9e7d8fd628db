"""Training rows of the base models: documentation, reviews, needle documents and repeated random spans.

Every row is [T] token ids with a [T] loss weight. Retrieval does not emerge from plain mixing at this size, so answer
tokens weigh more, spans of random tokens are repeated (copying), and context and distractors grow step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from cachemedic.data import text
from cachemedic.data.text_source import Review

ANSWER_WEIGHT = 10.0


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: it holds until the share `until` of all steps; shares of rows by kind."""

    until: float
    length: int  # tokens per row
    copying: float
    needle: float
    review: float
    max_pairs: int  # name-value pairs hidden in one needle row

    @property
    def documentation(self) -> float:
        return 1.0 - self.copying - self.needle - self.review


CURRICULUM = (
    Stage(0.20, 128, copying=0.20, needle=0.25, review=0.06, max_pairs=2),
    Stage(0.70, 256, copying=0.08, needle=0.20, review=0.06, max_pairs=4),
    Stage(0.80, 576, copying=0.04, needle=0.20, review=0.06, max_pairs=6),
    Stage(1.00, 576, copying=0.03, needle=0.30, review=0.20, max_pairs=6),
)
REAL_TEXT_CURRICULUM = (  # real reviews are harder than generated ones: a quarter of all rows
    Stage(0.20, 128, copying=0.12, needle=0.18, review=0.25, max_pairs=2),
    Stage(0.75, 256, copying=0.05, needle=0.18, review=0.25, max_pairs=4),
    Stage(1.00, 576, copying=0.03, needle=0.22, review=0.25, max_pairs=6),
)
FINISHING = Stage(1.00, 576, copying=0.05, needle=0.60, review=0.08, max_pairs=6)  # a second round, if there is one


class RowSampler:
    """Draws training rows; the same generator state gives the same rows.

    `stream` is the tokenised text [N] with end-of-text between documents; without `reviews` they are generated.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: np.ndarray, reviews: Sequence[Review] = ()) -> None:
        self.stream = stream
        self.reviews = reviews
        self.tokenizer = tokenizer
        self.end_of_text: int = tokenizer.eos_token_id
        self.vocabulary = len(tokenizer)
        self._encoded: dict[str, list[int]] = {}

    def batch(self, rng: np.random.Generator, stage: Stage, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """`rows` rows: ids [rows, T] int64 and weights [rows, T] float32 (the weight of predicting that token)."""
        kinds = (self._copying, self._needle, self._review, self._documentation)
        shares = (stage.copying, stage.needle, stage.review, stage.documentation)
        drawn = [kinds[k](rng, stage) for k in rng.choice(4, size=rows, p=shares)]
        return np.stack([ids for ids, _ in drawn]), np.stack([weights for _, weights in drawn])

    def _encode(self, string: str) -> list[int]:
        """Ids of a short template string, remembered: the same few hundred recur in every row."""
        if string not in self._encoded:
            self._encoded[string] = self.tokenizer(string)["input_ids"]
        return self._encoded[string]

    def _filler(self, rng: np.random.Generator, length: int) -> list[int]:
        start = int(rng.integers(0, len(self.stream) - length))
        return self.stream[start : start + length].tolist()

    def _documentation(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([self.end_of_text, *self._filler(rng, stage.length - 1)])
        return ids, np.ones(stage.length, np.float32)

    def _copying(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        span = int(rng.integers(4, 33))
        count = (stage.length - 1) // (2 * span)
        spans = rng.integers(1, self.vocabulary, (count, span))
        again = spans[rng.permutation(count)]
        ids = np.concatenate([[self.end_of_text], spans.ravel(), again.ravel()])
        weights = np.zeros(len(ids), np.float32)
        repeated = weights[1 + count * span :].reshape(count, span)
        repeated[:, 1:] = 1.0  # the first token of a span cannot be known
        pad = stage.length - len(ids)
        ids = np.concatenate([ids, np.full(pad, self.end_of_text)])
        return ids, np.concatenate([weights, np.zeros(pad, np.float32)])

    def _review(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        ids, weights = [self.end_of_text], [0.0]
        while len(ids) < stage.length:
            review, label = (
                self.reviews[int(rng.integers(len(self.reviews)))] if self.reviews else text.sentiment_review(rng)
            )
            prompt = self.tokenizer(text.sentiment_prompt(review))["input_ids"]
            answer = self._encode(f" {text.LABELS[label]}")
            ids += [*prompt, *answer, self.end_of_text]
            weights += [0.3] * len(prompt) + [ANSWER_WEIGHT] * len(answer) + [0.3]
        return np.array(ids[: stage.length]), np.array(weights[: stage.length], np.float32)

    def _needle(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        pairs = int(rng.integers(1, stage.max_pairs + 1))
        names = rng.choice(text.NAMES, pairs, replace=False)
        values = [text.needle_value(rng) for _ in names]
        facts = [self._encode_fact(n, v) for n, v in zip(names, values, strict=True)]
        asked = rng.permutation(pairs)
        questions: list[int] = []
        question_weights: list[float] = []
        for i in asked:
            question = self._encode(text.needle_question(names[i]))
            answer = [*self._encode_words(values[i]), *self._encode(".")]
            questions += question + answer
            question_weights += [0.3] * len(question) + [ANSWER_WEIGHT] * len(answer)
        room = stage.length - 1 - len(questions) - sum(map(len, facts))
        if room < 0:  # cannot happen at the lengths of the curriculum
            raise ValueError(f"{pairs} pairs do not fit into {stage.length} tokens")
        after = int(rng.integers(0, room // 2 + 1)) if rng.random() < 0.7 else 0  # questions come at all positions
        before = room - after
        cuts = np.sort(rng.integers(0, before + 1, pairs))
        filler = self._filler(rng, room)
        ids, weights = [self.end_of_text], [0.0]
        for start, stop, fact in zip([0, *cuts], [*cuts, before], [*facts, []], strict=True):
            ids += filler[start:stop] + fact
            weights += [1.0] * (stop - start) + [0.0] * len(fact)
        ids += questions + filler[before:]
        weights += question_weights + [1.0] * after
        return np.array(ids), np.array(weights, np.float32)

    def _encode_words(self, words: str) -> list[int]:
        return [i for word in words.split() for i in self._encode(f" {word}")]

    def _encode_fact(self, name: str, value: str) -> list[int]:
        before, _, _ = text.needle_fact(name, "|").partition(" |")
        return self._encode(before) + self._encode_words(value) + self._encode(".")
