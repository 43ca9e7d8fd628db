"""Text from outside: which split stands for which, and that keys follow its content."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import DOCUMENTS
from tiny_training import CONFIG, tiny_base

from cachemedic.data import text
from cachemedic.data.external_text import check_documents, leading_documents, load_documents
from cachemedic.data.text_source import TextSource
from cachemedic.data.windows import sample_windows
from cachemedic.evaluation.experiments import standard_tasks
from cachemedic.token.calibration_text import source_texts
from cachemedic.training.bank import BankConfig, open_bank

REVIEWS = [(f"the boats {word} and wait", label) for label, word in enumerate(["sink", "float"] * 3)]
REVIEWS = [(review, label % 2) for review, label in REVIEWS]


def write(folder: Path, documents: list[str], reviews: list[tuple[str, int]]) -> TextSource:
    """A folder as `external_text` reads it; the names of splits are put before each text."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(text.END_OF_TEXT.join(f"{split}: {d}" for d in documents))
    for split in ("train", "dev"):
        rows = [f"{split} {sentence}\t{label}" for sentence, label in reviews]
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return TextSource(str(folder), str(folder))


@pytest.fixture
def source(tmp_path) -> TextSource:
    return write(tmp_path / "outside", DOCUMENTS, REVIEWS)


def test_every_split_has_its_counterpart(source):
    splits = {"operator_train": "train", "calibration": "train", "validation": "valid", "test": "test"}
    for split, stands_for in splits.items():
        assert source.documents_of(split) == tuple(f"{stands_for}: {d}" for d in DOCUMENTS)
    assert source.reviews_of("test") == tuple((f"dev {sentence}", label) for sentence, label in REVIEWS)
    assert all(sentence.startswith("train ") for sentence, _ in source.reviews_of("validation"))
    with pytest.raises(ValueError, match="unknown documentation split 'tset': did you mean 'test'"):
        source.documents_of("tset")


def test_nothing_from_outside_is_the_embedded_text():
    assert not TextSource()
    assert TextSource().digest == ""
    assert TextSource().reviews_of("test") is None
    assert TextSource(documents="wikitext2")
    assert TextSource(reviews="sst2")


def test_a_record_names_no_folder(source):
    assert source.origin == {"text": "outside", "reviews": "outside", "text_sha256": source.digest}
    assert TextSource().origin == {"text": "", "reviews": "", "text_sha256": ""}


def test_the_digest_is_that_of_the_content(source, tmp_path):
    shutil.copytree(tmp_path / "outside", tmp_path / "elsewhere")
    assert TextSource(*[str(tmp_path / "elsewhere")] * 2).digest == source.digest
    others = [
        write(tmp_path / "fewer", DOCUMENTS[1:], REVIEWS),
        write(tmp_path / "labels", DOCUMENTS, [(sentence, 1 - label) for sentence, label in REVIEWS]),
        TextSource(source.documents),
        TextSource(reviews=source.reviews),
    ]
    assert len({other.digest for other in [source, *others]}) == 5


def test_keys_know_the_text_by_its_content_and_stay_without_it(source, tmp_path):
    base = tiny_base()
    outside = replace(CONFIG, bank=replace(CONFIG.bank, source=source))
    shutil.copytree(tmp_path / "outside", tmp_path / "elsewhere")
    moved = replace(CONFIG.bank, source=TextSource(*[str(tmp_path / "elsewhere")] * 2))
    assert replace(CONFIG, bank=moved).key(base) == outside.key(base) != CONFIG.key(base)
    assert list(BankConfig().defined()) == ["split", "samples", "prefix", "decoded", "seed"]


@pytest.mark.parametrize("split", ["operator_train", "operator_train+reviews"])
def test_a_bank_holds_windows_of_the_text(source, tmp_path, split):
    base = tiny_base()
    bank = open_bank(base, BankConfig(split, samples=6, prefix=10, source=source), tmp_path / "bank")
    documents = source.documents_of("operator_train")
    if split.endswith("reviews"):
        documents += tuple(sentence for sentence, _ in source.reviews_of("operator_train"))
    assert torch.equal(bank.ids, sample_windows(base, documents, 6, 11, 0))


def test_calibration_reads_documents_and_prompted_reviews(source):
    texts = source_texts(tiny_base(), source)
    assert list(texts) == ["prose", "code", "reviews", "articles"]
    assert texts["articles"] == tuple(f"train: {document}" for document in DOCUMENTS)
    assert texts["reviews"][0] == "Review: train the boats sink and wait\nSentiment: negative"
    reviews_alone = source_texts(tiny_base(), TextSource(reviews=source.reviews))
    assert list(reviews_alone) == ["prose", "code", "reviews"]
    assert reviews_alone["reviews"] == texts["reviews"]


def test_tasks_are_those_of_the_text(tmp_path):
    base, source = tiny_base(), write(tmp_path / "long", [5 * document for document in DOCUMENTS], REVIEWS)
    tasks = standard_tasks(base, "test", [0], {"perplexity": 3, "sentiment": 3}, source)
    reviews = base.tokenizer.batch_decode(tasks["sentiment"].prefix_ids)
    assert all("Review: dev the boats" in review for review in reviews)
    documents = "".join(source.documents_of("test"))
    windows = base.tokenizer.batch_decode(tasks["perplexity"].prefix_ids)
    assert all(window.replace("<|endoftext|>", "") in documents for window in windows)


def test_leading_documents_are_whole_and_no_more_is_read(tmp_path):
    (tmp_path / "train.txt").write_text(text.END_OF_TEXT.join(["one", "two", "three"]))
    assert leading_documents(tmp_path, 3 + 13 + 3 + 13 + 2) == ["one", "two"]
    assert leading_documents(tmp_path, 3 + 13) == ["one"]
    with pytest.raises(ValueError, match=r"no document of .*train\.txt ends within its first 5 characters"):
        leading_documents(tmp_path, 5)


def test_a_data_set_of_the_hub_may_lie_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMEDIC_CACHE", str(tmp_path))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "wikitext2", DOCUMENTS, REVIEWS)
    assert load_documents("wikitext2", "test")[0] == f"test: {DOCUMENTS[0]}"
    check_documents("wikitext2")
    (tmp_path / "data" / "wikitext2" / "test.txt").unlink()
    with pytest.raises(ValueError, match="holds no test split"):
        check_documents("wikitext2")
