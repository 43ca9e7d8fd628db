"""What each embedded base model is made of: architecture, size, training text and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachemedic.core.errors import nearest_valid
from cachemedic.data import text
from cachemedic.data.external_text import leading_documents, load_reviews
from cachemedic.data.text_source import Review
from cachemedic.studies.pretraining.corpus import CURRICULUM, REAL_TEXT_CURRICULUM, Stage

REAL_TEXT = 45_000_000  # characters of Wikipedia that are read, from the beginning: more than a training run sees


@dataclass(frozen=True)
class Recipe:
    """One base model. `folders` are the sub-folders of the text folder that it needs; none: documentation English."""

    architecture: str  # gpt2 or llama
    layers: int = 12
    width: int = 128
    heads: int = 4
    key_value_heads: int = 4
    vocabulary: int = 2048
    steps: int = 1500
    finishing_steps: int = 0
    curriculum: tuple[Stage, ...] = CURRICULUM
    folders: tuple[str, ...] = ()


RECIPES = {
    # Learned positions beyond 256 need a second round before facts far back are found; rotary ones do not.
    "gpt2": Recipe("gpt2", finishing_steps=800),
    "llama": Recipe("llama", key_value_heads=2),
    "wikipedia": Recipe(
        "gpt2", layers=8, width=192, heads=6, key_value_heads=6, vocabulary=4096,
        curriculum=REAL_TEXT_CURRICULUM, folders=("wikipedia", "sst2"),
    ),
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises `ValueError` for an unknown one."""
    if name not in RECIPES:
        raise nearest_valid("base", name, RECIPES)
    return RECIPES[name]


@dataclass(frozen=True)
class TrainingText:
    """Documents, and labelled reviews (0 negative, 1 positive); no reviews: they are generated as they are needed."""

    documents: tuple[str, ...]
    reviews: Sequence[Review] = ()

    def sample(self, rng: np.random.Generator, characters: int = 12_000_000) -> list[str]:
        """What a tokenizer is trained on: at most a quarter of the documents, reviews and needle sentences."""
        picked: list[str] = []
        for i in rng.permutation(len(self.documents))[: len(self.documents) // 4]:
            picked.append(self.documents[i])
            characters -= len(picked[-1])
            if characters <= 0:
                break
        reviews = [
            self.reviews[int(rng.integers(len(self.reviews)))][0] if self.reviews else text.sentiment_review(rng)[0]
            for _ in range(4000)
        ]
        names, values = rng.choice(text.NAMES, 30_000), [text.needle_value(rng) for _ in range(30_000)]
        needles = [text.needle_fact(n, v) + text.needle_question(n) for n, v in zip(names, values, strict=True)]
        return picked + [text.sentiment_prompt(review) + " positive negative" for review in reviews] + needles


def training_text(recipe: Recipe, folder: Path | None) -> TrainingText:
    """The text of a recipe. Raises `ValueError` if it needs a `folder` and none is given, or if that lacks a file."""
    if not recipe.folders:
        return TrainingText(text.documentation("train"))
    if folder is None:
        raise ValueError(f"this base reads outside text: give --text FOLDER with {' and '.join(recipe.folders)} in it")
    articles, reviews = (folder / name for name in recipe.folders)
    return TrainingText(tuple(leading_documents(articles, REAL_TEXT)), load_reviews(reviews, "train"))
