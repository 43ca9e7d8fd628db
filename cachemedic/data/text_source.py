"""Which text an experiment reads: that of the installed packages with generated reviews, or text from outside."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cachemedic.core.errors import nearest_valid
from cachemedic.data.external_text import load_documents, load_reviews
from cachemedic.data.text import DOCUMENTATION_SPLITS, documentation, text_hash

Review = tuple[str, int]  # text; 0 negative, 1 positive

# The splits of an outside text that stand for those of the embedded one. SST-2 has no public labels of its test split.
TRAINING = dict.fromkeys(("train", "operator_train", "calibration"), "train")
DOCUMENTS = TRAINING | {"validation": "validation", "test": "test"}
REVIEWS = TRAINING | {"validation": "train", "test": "validation"}


@dataclass(frozen=True)
class TextSource:
    """Where documents and labelled reviews come from: a local folder, or the name of a data set (`external_text`).

    An empty name is the embedded text: documentation English, and reviews that are generated.
    """

    documents: str = ""
    reviews: str = ""

    def __bool__(self) -> bool:
        """Whether any of it comes from outside."""
        return bool(self.documents or self.reviews)

    def documents_of(self, split: str) -> tuple[str, ...]:
        """The documents that stand for a documentation split. Raises `ValueError` for an unknown one."""
        if not self.documents:
            return documentation(split)
        return _documents(self.documents, _outside(split, DOCUMENTS))

    def reviews_of(self, split: str) -> tuple[Review, ...] | None:
        """The reviews that stand for a split, None where they are generated. Raises `ValueError` for an unknown one."""
        return _reviews(self.reviews, _outside(split, REVIEWS)) if self.reviews else None

    @property
    def origin(self) -> dict[str, str]:
        """What a record says of it: names without the folders they lie in, which differ by machine, and the digest."""
        return {"text": Path(self.documents).name, "reviews": Path(self.reviews).name, "text_sha256": self.digest}

    @property
    def digest(self) -> str:
        """sha256 of all splits of what comes from outside, the same wherever the files lie; empty if nothing does."""
        if not self:
            return ""
        digest = hashlib.sha256()
        for split in ("train", "validation", "test"):
            if self.documents:
                digest.update(text_hash(self.documents_of(split)).encode())
            digest.update(repr(self.reviews_of(split)).encode())
        return digest.hexdigest()


EMBEDDED_TEXT = TextSource()


@cache
def _documents(source: str, split: str) -> tuple[str, ...]:
    return tuple(load_documents(source, split))


@cache
def _reviews(source: str, split: str) -> tuple[Review, ...]:
    return tuple(load_reviews(source, split))


def _outside(split: str, splits: dict[str, str]) -> str:
    if split not in splits:
        raise nearest_valid("documentation split", split, DOCUMENTATION_SPLITS)
    return splits[split]
