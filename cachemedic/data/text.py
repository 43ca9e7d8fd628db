"""Embedded text: documentation English read from the installed packages, and generated reviews.

Nothing is downloaded and nothing is copied into the repository: the documentation corpus is the set of docstrings of
the pinned environment, read with `ast`, split by package. Training text may come from any installed package;
calibration, validation and test text come from pinned packages only, so that they are the same on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from cachemedic.core.cache_folder import cache_folder
from cachemedic.core.files import read_hashed, write_hashed
from cachemedic.core.progress import tqdm

END_OF_TEXT = "<|endoftext|>"
MIN_DOCSTRING = 80  # characters; shorter docstrings are mostly one-line boilerplate

# Split by package: nothing of a package on one line is ever seen by another line.
DOCUMENTATION_SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("stdlib", "torch", "transformers", "scipy", "numpy", "matplotlib"),
    "operator_train": ("huggingface_hub", "fsspec", "jupyter_server", "hypothesis", "IPython", "PIL", "tornado"),
    "calibration": ("networkx",),
    "validation": ("datasets", "seaborn", "jsonschema"),
    "test": ("pandas",),
}

CACHE_DIR = cache_folder()


def _not_installed(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"package {package!r} is part of the documentation corpus but is not installed: install what requirements.txt "
        "lists, or give text of your own (calibrate: texts=, on the command line --texts)"
    )


def _package_folder(package: str) -> Path:
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise _not_installed(package)
    return Path(spec.origin).parent


def _python_files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in {"site-packages", "__pycache__", "test", "tests", "idlelib"})
        yield from (Path(root, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(package: str) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, None] = {}  # an ordered set: many packages repeat a docstring
    for path in _python_files(_package_folder(package)):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # templates and deliberately broken files
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text) >= MIN_DOCSTRING:
                found[text] = None
    return list(found)


def _version(package: str) -> str:
    if package == "stdlib":
        return sys.version.split()[0]
    distributions = importlib.metadata.packages_distributions().get(package)
    if not distributions:
        raise _not_installed(package)
    return importlib.metadata.version(distributions[0])


@cache
def documentation(split: str) -> tuple[str, ...]:
    """The docstrings of one split, in a fixed order (by package, file and position).

    Parsed once per package version and kept under `CACHE_DIR`. Raises `ValueError` for an unknown split.
    """
    if split not in DOCUMENTATION_SPLITS:
        raise ValueError(f"unknown documentation split {split!r}; allowed: {', '.join(DOCUMENTATION_SPLITS)}")
    documents: list[str] = []
    packages = DOCUMENTATION_SPLITS[split]
    for package in tqdm(packages, desc=f"documentation text ({split})", disable=None):
        stored = CACHE_DIR / "text" / f"{package}-{_version(package)}.text"
        if not stored.exists():
            write_hashed(stored, END_OF_TEXT.join(_docstrings(package)).encode())
        documents += read_hashed(stored).decode().split(END_OF_TEXT)
    return tuple(documents)


@cache
def source_code(split: str, characters: int = 2_000_000) -> tuple[str, ...]:
    """The Python files of the packages of a documentation split, in a fixed order, up to so many characters a package.

    Raises `ValueError` for an unknown split.
    """
    if split not in DOCUMENTATION_SPLITS:
        raise ValueError(f"unknown documentation split {split!r}; allowed: {', '.join(DOCUMENTATION_SPLITS)}")
    files: list[str] = []
    for package in DOCUMENTATION_SPLITS[split]:
        read = 0
        for path in _python_files(_package_folder(package)):
            text = path.read_text(encoding="utf-8", errors="ignore")
            read += len(text)
            if read > characters:
                break
            files.append(text)
    return tuple(files)


def text_hash(documents: tuple[str, ...]) -> str:
    """sha256 of a corpus, recorded beside everything computed from it."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode())
        digest.update(b"\0")
    return digest.hexdigest()


# --- generated sentiment reviews --------------------------------------------------------------------------------------

SUBJECTS = (
    "film story book album meal hotel phone camera garden concert lecture bakery museum train jacket novel game "
    "teacher battery keyboard waiter soundtrack ending plot service room coffee salad bread bicycle lamp tent market "
    "actor singer guide painting recipe engine screen driver village harbour"
).split()
POSITIVE = (
    "wonderful delightful charming superb excellent brilliant lovely splendid fresh generous clever warm elegant "
    "reliable graceful vivid cheerful bright gentle honest inspiring joyful memorable perfect polished pleasant"
).split()
NEGATIVE = (
    "terrible dreadful boring awful clumsy bitter broken cold crude dull dirty feeble grim harsh lazy messy noisy "
    "painful poor rude shabby slow stale tedious ugly unreliable"
).split()
FRAMES = (
    "the {s} was {a}",
    "I found the {s} {a}",
    "we thought the {s} looked {a}",
    "to me the {s} felt {a}",
    "everyone called the {s} {a}",
    "their {s} seemed {a} from the first day",
    "the {s} turned out {a}",
    "nobody told us that the {s} would be so {a}",
)
LINKS = (". ", ", and ", "; ", ". Later ", ". In the end ", ", while ")
LABELS = ("negative", "positive")


def sentiment_review(rng: np.random.Generator) -> tuple[str, int]:
    """One generated review and its label (0 negative, 1 positive).

    Three or five clauses, at most a minority of which disagree with the label: the label is the majority, so that
    a reader has to take the whole review into account.
    """
    label = int(rng.integers(2))
    clauses = int(rng.choice((3, 5)))
    contrary = int(rng.integers(0, clauses // 2 + 1)) if rng.random() < 0.4 else 0
    polarity = np.array([1 - label] * contrary + [label] * (clauses - contrary))
    rng.shuffle(polarity)
    text = ""
    for i, positive in enumerate(polarity):
        adjective = rng.choice(POSITIVE if positive else NEGATIVE)
        text += (rng.choice(LINKS) if i else "") + rng.choice(FRAMES).format(s=rng.choice(SUBJECTS), a=adjective)
    return text[0].upper() + text[1:] + ".", label


def sentiment_prompt(review: str) -> str:
    """The prompted form of the task; the label follows as ` positive` or ` negative`."""
    return f"Review: {review}\nSentiment:"


# --- generated needle documents ---------------------------------------------------------------------------------------

NAMES = (
    "falcon otter badger heron lynx raven tiger panda zebra camel goose moose robin whale shark eagle horse mouse "
    "snake sheep koala llama bison crane finch gecko hyena lemur mole newt owl pony quail rabbit seal toad viper wolf "
    "yak bear beetle cobra donkey ferret gibbon hamster iguana jaguar kitten lizard magpie ocelot parrot salmon turkey"
).split()
VALUES = (
    "amber copper silver golden crimson violet indigo scarlet ivory ebony coral olive maple cedar willow birch acorn "
    "river canyon valley meadow desert island glacier lagoon summit harbor bridge castle tower lantern candle mirror "
    "hammer anchor basket ladder needle pencil ribbon saddle trumpet violin whistle blanket button carpet feather "
    "helmet kettle marble pepper pillow rocket sugar thunder velvet window winter yellow zipper butter cactus dragon"
).split()


def needle_fact(name: str, value: str) -> str:
    """The sentence that is hidden in the context."""
    return f" Remember this pair: {name} {value}."


def needle_question(name: str) -> str:
    """The question at the end; the greedy continuation must be the value, then a full stop."""
    return f"\nQuestion: what was paired with {name}? Answer: {name}"


def needle_value(rng: np.random.Generator) -> str:
    """Two words, so that 4,000 answers exist and guessing scores zero."""
    return " ".join(rng.choice(VALUES, 2, replace=False))
