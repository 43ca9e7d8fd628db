"""Text from outside: WikiText-2, SST-2 and the like, from a local folder or by their name on the Hugging Face hub.

A folder holds one file per split: `train`, `valid` (or `validation`, `dev`) and `test`, as `.txt`, `.txt.xz` or `.tsv`.
A data set of `HUB` is not fetched where it lies in the cache folder, as `data/wikitext2` or `data/sst2`.
"""

from __future__ import annotations

import csv
import lzma
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from cachemedic.core.cache_folder import cache_folder
from cachemedic.core.errors import nearest_valid
from cachemedic.data.text import END_OF_TEXT

HUB = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"), "sst2": ("stanfordnlp/sst2", "default")}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
TEXT_ENDINGS, REVIEW_ENDINGS = (".txt", ".txt.xz"), (".tsv",)
ARTICLE = re.compile(r"^(?= = [^=\n]+ = ?$)", re.MULTILINE)  # the heading of a WikiText article


def load_documents(source: str | Path, split: str = "test") -> list[str]:
    """The documents of one split: WikiText articles, or what end-of-text separates, or the rows of a hub data set.

    Raises `ValueError` for an unknown source or split.
    """
    if folder := _local(source):
        with _open(_split_file(folder, split, TEXT_ENDINGS)) as file:
            parts = file.read().split(END_OF_TEXT)
    else:
        rows = [row.rstrip("\n") for row in _hub(source, split)["text"]]
        parts = ["\n".join(rows)] if any(map(ARTICLE.match, rows)) else rows
    return [document for part in parts for document in ARTICLE.split(part) if document.strip()]


def leading_documents(folder: Path, characters: int, split: str = "train") -> list[str]:
    """The whole documents among the first `characters` of a folder's split: a large file is read no further.

    Raises `ValueError` for an unknown split or if no document ends there.
    """
    path = _split_file(folder, split, TEXT_ENDINGS)
    with _open(path) as file:
        documents = file.read(characters).split(END_OF_TEXT)[:-1]
    if not documents:
        raise ValueError(f"no document of {path} ends within its first {characters} characters")
    return documents


def load_reviews(source: str | Path, split: str = "validation") -> list[tuple[str, int]]:
    """The (sentence, label) pairs of one split, 0 negative, 1 positive.

    Raises `ValueError` for an unknown source or split, or a label that is neither.
    """
    if folder := _local(source):
        with _split_file(folder, split, REVIEW_ENDINGS).open(encoding="utf-8") as file:
            rows = [
                (row["sentence"], row["label"]) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            ]
    else:
        data = _hub(source, split)
        rows = list(zip(data["sentence"], data["label"], strict=True))
    for sentence, label in rows:
        if str(label) not in {"0", "1"}:
            raise ValueError(f"label {label!r} of {sentence!r} is neither 0 (negative) nor 1 (positive)")
    return [(sentence.strip(), int(label)) for sentence, label in rows]


def check_documents(source: str) -> None:
    """Raise `ValueError` for what cannot be a source of documents; nothing is read or fetched."""
    _check_source(source, TEXT_ENDINGS, SPLITS)


def check_reviews(source: str) -> None:
    """Raise `ValueError` for what cannot be a source of reviews; nothing is read or fetched."""
    _check_source(source, REVIEW_ENDINGS, ("train", "validation"))


def _check_source(source: str, endings: tuple[str, ...], splits: Iterable[str]) -> None:
    if folder := _local(source):
        for split in splits:
            _split_file(folder, split, endings)
    else:
        _check_hub_name(source)


def _local(source: str | Path) -> Path | None:
    """The folder of a source that lies on this machine."""
    kept = cache_folder() / "data" / source
    return next((folder for folder in (Path(source), kept) if folder.is_dir()), None)


def _open(path: Path) -> TextIO:
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")


def _split_file(folder: Path, split: str, endings: tuple[str, ...]) -> Path:
    _check_split(split)
    names = [f"{name}{ending}" for name in SPLITS[split] for ending in endings]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no {split} split; expected one of {', '.join(names)}")


def _hub(source: str | Path, split: str) -> Any:
    """The rows of a hub data set, by a name of `HUB` or a full name `owner/name`."""
    _check_split(split)
    _check_hub_name(source)
    import datasets  # on use: slow to import, and needed online only

    return datasets.load_dataset(*HUB.get(str(source), (str(source),)), split=split)


def _check_hub_name(source: str | Path) -> None:
    if source not in HUB and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        besides = "the `owner/name` of a Hugging Face data set, or an existing local folder"
        raise nearest_valid("text", str(source), HUB, besides)
