"""Embedded text: splits, generated examples, hashes, and files that are written whole or not at all."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from cachemedic.data import text

ROOT = Path(__file__).resolve().parents[2]


def test_no_package_is_in_two_splits():
    for (_, first), (_, second) in itertools.combinations(text.DOCUMENTATION_SPLITS.items(), 2):
        assert not set(first) & set(second)


def test_every_package_but_the_standard_library_is_pinned():
    pinned = {re.split(r"[=\[; ]", line)[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    distributions = {"PIL": "pillow"}
    for package in itertools.chain(*text.DOCUMENTATION_SPLITS.values()):
        name = distributions.get(package, package).lower()
        assert package == "stdlib" or {name, name.replace("_", "-")} & pinned, package


@pytest.fixture
def _small_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CACHE_DIR", tmp_path)
    monkeypatch.setattr(text, "DOCUMENTATION_SPLITS", {"one": ("tqdm",), "both": ("tqdm", "jsonschema")})
    text.documentation.cache_clear()
    yield
    text.documentation.cache_clear()


@pytest.mark.usefixtures("_small_splits")
def test_documentation_is_that_of_the_packages_in_their_order():
    one, both = text.documentation("one"), text.documentation("both")
    assert both[: len(one)] == one
    assert len(both) > len(one) > 5
    assert len(set(one)) == len(one)
    assert all(len(document) >= text.MIN_DOCSTRING and text.END_OF_TEXT not in document for document in both)
    assert any("Decorate an iterable object" in document for document in one)  # of the class `tqdm`


@pytest.mark.usefixtures("_small_splits")
def test_documentation_is_parsed_once(tmp_path, monkeypatch):
    first = text.documentation("one")
    monkeypatch.setattr(text, "_docstrings", lambda package: pytest.fail("parsed again"))
    text.documentation.cache_clear()
    assert text.documentation("one") == first
    assert [path.name.split("-")[0] for path in (tmp_path / "text").iterdir()] == ["tqdm"]


@pytest.mark.usefixtures("_small_splits")
def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(text.DOCUMENTATION_SPLITS, "one", ("no_such_package",))
    with pytest.raises(ModuleNotFoundError, match="'no_such_package' is part of .* or give text of your own"):
        text.documentation("one")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown documentation split 'dev'; allowed: train, operator_train"):
        text.documentation("dev")


def test_the_hash_of_a_corpus_tells_its_documents_apart():
    corpora = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("abc",), ("ab", "c", "")]
    assert len({text.text_hash(corpus) for corpus in corpora}) == len(corpora)
    assert text.text_hash(("ab", "c")) == text.text_hash(("ab", "c"))
    assert text.text_hash(()) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def words(review: str) -> list[str]:
    return re.findall(r"[a-z]+", review.lower())


def test_reviews_are_labelled_by_the_majority_of_their_clauses():
    rng = np.random.default_rng(0)
    contrary = 0
    for _ in range(300):
        review, label = text.sentiment_review(rng)
        positive = sum(word in text.POSITIVE for word in words(review))
        negative = sum(word in text.NEGATIVE for word in words(review))
        assert positive + negative in (3, 5)
        assert label == (positive > negative)
        contrary += min(positive, negative) > 0
    assert 30 < contrary < 150


def test_reviews_and_needles_depend_on_the_generator_alone():
    for draw in (text.sentiment_review, text.needle_value):
        first, second = ([draw(rng) for rng in [np.random.default_rng(seed)] for _ in range(50)] for seed in (1, 1))
        other = [draw(np.random.default_rng(seed)) for seed in range(50)]
        assert first == second != other
    labels = [text.sentiment_review(np.random.default_rng(seed))[1] for seed in range(100)]
    assert 30 < sum(labels) < 70


def test_words_of_the_generated_text_do_not_overlap():
    assert not set(text.POSITIVE) & set(text.NEGATIVE)
    assert not set(text.NAMES) & set(text.VALUES)
    for listed in (text.POSITIVE, text.NEGATIVE, text.NAMES, text.VALUES, text.SUBJECTS):
        assert len(set(listed)) == len(listed)


def test_needles_ask_for_what_they_hide():
    value = text.needle_value(np.random.default_rng(0))
    first, second = value.split()
    assert first != second
    assert f"otter {value}" in text.needle_fact("otter", value)
    assert text.needle_question("otter").endswith("otter")
    assert value not in text.needle_question("otter")
