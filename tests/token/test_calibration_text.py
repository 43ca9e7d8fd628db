"""The text that families D and E are calibrated on: both kinds of it, none of a test's, and what it is good for."""

import re

import pytest
import torch
from tiny import DOCUMENTS
from tiny_repair import base_of

from cachemedic.data import text_source
from cachemedic.data.tasks import sentiment_task
from cachemedic.data.text import LABELS
from cachemedic.defenses.defense import CachedTokens
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.models.load import load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.layerwise import calibration
from cachemedic.token.layerwise.calibration import calibrate, calibration_windows, vectors_of
from cachemedic.token.layerwise.scrub import Scrubber
from cachemedic.token.layerwise.token_vectors import join

REVIEW = re.compile(r"Review: ([^\n]+)\nSentiment: (positive|negative)")


def shorten(monkeypatch, **sizes: int) -> None:
    for name, value in sizes.items():
        monkeypatch.setattr(calibration, name, value)


@pytest.fixture
def few_windows(monkeypatch):
    """Four windows of tiny documents and eight of reviews."""
    monkeypatch.setattr(text_source, "documentation", lambda split: tuple(DOCUMENTS))
    shorten(monkeypatch, DOCUMENTATION_SAMPLES=4, REVIEW_SAMPLES=8, REVIEWS=90, CALIBRATION_LENGTH=280)


def texts(windows: torch.Tensor) -> list[str]:
    return base_of("llama").tokenizer.batch_decode(windows, skip_special_tokens=True)


@pytest.mark.usefixtures("few_windows")
def test_windows_are_of_documentation_and_of_reviews():
    windows = calibration_windows(base_of("llama"))
    assert windows.shape == (12, 280)
    assert (windows[:, 0] == base_of("llama").tokenizer.bos_token_id).all()
    for number, text in enumerate(texts(windows)):
        assert ("the old bridge" in text) == (number < 4)
        assert ("\nSentiment: " in text) == (number >= 4)
    found = REVIEW.findall("".join(texts(windows[4:])))
    assert len(found) > 5
    assert {label for _, label in found} == set(LABELS)
    few = calibration_windows(base_of("llama"), code_alone=True)
    assert few.shape == (3, 280), "as many of each kind"
    assert ["\nSentiment: " in text for text in texts(few)] == [False, True, True]


def test_windows_are_no_longer_than_a_context_with_room_to_decode(few_windows, monkeypatch):
    shorten(monkeypatch, CALIBRATION_LENGTH=544)
    assert calibration_windows(base_of("llama"), code_alone=True).shape[1] == 320 - 32


@pytest.mark.usefixtures("few_windows")
def test_a_model_too_large_for_the_memory_gets_fewer_windows_of_each_kind(monkeypatch):
    base = base_of("llama")
    whole = vectors_of(base, calibration_windows(base)).x
    bytes_of_all = whole.numel() * whole.element_size()
    shorten(monkeypatch, MEMORY=bytes_of_all // 2)
    assert len(calibration_windows(base)) == 6
    shorten(monkeypatch, MEMORY=1)
    assert len(calibration_windows(base)) == 2


@pytest.mark.usefixtures("few_windows")
def test_windows_depend_on_the_seed_alone_and_hold_no_review_of_a_task():
    base = base_of("llama")
    windows = calibration_windows(base)
    assert torch.equal(calibration_windows(base), windows)
    assert not torch.equal(calibration_windows(base, seed=6), windows)
    measured = {review for review, _ in REVIEW.findall("".join(texts(windows[4:])))}
    for split in ("test", "validation"):
        task = sentiment_task(base.tokenizer, range(10), n=16, split=split)
        asked = {text.removeprefix("Review: ") for text in texts(task.prefix_ids)}
        assert len(asked) > 150
        assert asked.isdisjoint(measured)


def test_family_d_of_an_embedded_base_is_calibrated_without_a_forward_pass():
    base = load_base("embedded-llama")
    called: list[object] = []
    handle = base.model.base_model.register_forward_pre_hook(lambda *args: called.append(args))
    operator = calibrate(RepairOperator.create("layerwise-D", base.model.config, range(12)), base)
    handle.remove()
    assert operator.transform is not None
    assert not called


def test_the_code_reaches_what_reviews_hold(monkeypatch):
    """Quantisers that were fitted to documentation alone would leave a third of the variance of layer 1."""
    shorten(monkeypatch, DOCUMENTATION_SAMPLES=16, REVIEW_SAMPLES=8, REVIEWS=200, CALIBRATION_LENGTH=200)
    base = load_base("embedded-llama")
    operator = calibrate(RepairOperator.create("layerwise-E", base.model.config, range(12), rounds=0), base)
    operator.strength.data.fill_(1.0)
    scrubber, task = Scrubber(base.model, operator), sentiment_task(base.tokenizer, n=8)
    clean, valid = clean_pass(base.model, task), task.prefix_mask
    kept = scrubber.write(CachedTokens.behind_padding(clean.k, clean.v, task.prefix_ids, valid))
    lost = torch.zeros_like(clean.k)
    mended = scrubber.read(CachedTokens.behind_padding(lost, lost, task.prefix_ids, valid), kept)
    stored, found = (operator.transform.scale[:, None] * join(*x) for x in ((clean.k, clean.v), (mended.k, mended.v)))
    behind_first = valid & (valid.cumsum(1) > 1)
    for layer in (1, 2):
        wanted = stored[:, layer][behind_first]
        error = (found[:, layer][behind_first] - wanted).square().mean()
        assert error < 0.15 * (wanted - wanted.mean(0)).square().mean()
