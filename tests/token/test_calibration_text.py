"""The text that families D and E are calibrated on: several kinds of it, none of a test's, and what it is good for."""

import re

import torch
from tiny import DOCUMENTS
from tiny_repair import base_of

from cachemedic.core.threads import workers
from cachemedic.data.tasks import sentiment_task
from cachemedic.defenses.defense import CachedTokens
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.models.load import load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.token import joint_calibration
from cachemedic.token.calibration_text import default_texts, windows
from cachemedic.token.joint_calibration import fit_joint_model
from cachemedic.token.prior_fit import take_prior_of_others
from cachemedic.token.token_repair import TokenRepair

KINDS = {"prose": DOCUMENTS, "reviews": [f"Review: a film, number {i}.\nSentiment: positive" for i in range(90)]}


def test_every_kind_gives_as_many_windows_each_begun_as_a_text():
    base = base_of("llama")
    found = windows(base, KINDS, count=6, length=60, seed=0)
    assert found.shape == (6, 60)
    assert (found[:, 0] == base.tokenizer.bos_token_id).all()
    texts = base.tokenizer.batch_decode(found, skip_special_tokens=True)
    assert ["the old bridge" in text for text in texts] == [True] * 3 + [False] * 3
    assert ["Sentiment: " in text for text in texts] == [False] * 3 + [True] * 3


def test_windows_depend_on_the_seed_alone():
    base = base_of("llama")
    found = windows(base, KINDS, 6, 60, seed=0)
    assert torch.equal(windows(base, KINDS, 6, 60, seed=0), found)
    assert not torch.equal(windows(base, KINDS, 6, 60, seed=1), found)


def test_no_review_is_one_of_a_task():
    base = base_of("llama")
    measured = set(default_texts(base)["reviews"])
    for split in ("test", "validation"):
        task = sentiment_task(base.tokenizer, range(10), n=16, split=split)
        asked = base.tokenizer.batch_decode(task.prefix_ids, skip_special_tokens=True)
        asked = {re.sub("\\s+$", "", text) for text in asked}
        assert len(asked) > 150
        assert not any(review.startswith(tuple(asked)) for review in measured)


def test_a_large_model_is_measured_on_fewer_windows(monkeypatch):
    base, seen = base_of("llama"), []
    monkeypatch.setattr(joint_calibration, "windows", lambda *args: seen.append(args[2]) or windows(*args))
    fit_joint_model(base, DOCUMENTS)
    monkeypatch.setattr(joint_calibration, "MEMORY", 1)
    fit_joint_model(base, DOCUMENTS)
    assert seen[0] == joint_calibration.WINDOWS
    assert seen[2] == joint_calibration.HELD_OUT


def test_the_code_reaches_what_reviews_hold():
    """Under a joint model of prose alone, the code would leave most of what prompts hold beyond it."""
    base = load_base("embedded-llama")
    operator = RepairOperator.from_pretrained("E/embedded-llama")
    repair, task = TokenRepair(base.model, operator, "restore"), sentiment_task(base.tokenizer, n=8)
    clean, valid = clean_pass(base.model, task), task.prefix_mask
    kept = repair.write(CachedTokens.behind_padding(clean.k, clean.v, task.prefix_ids, valid))
    lost = torch.zeros_like(clean.k)
    told = repair.read(CachedTokens.behind_padding(lost, lost, task.prefix_ids, valid), kept)
    for stored, found in ((clean.k, told.k), (clean.v, told.v)):
        wanted, error = (x.movedim(3, 1)[valid] for x in (stored, found - stored))
        assert error.square().mean() < 0.15 * (wanted - wanted.mean(0)).square().mean()


def test_what_ids_leave_is_measured_on_windows_that_the_prior_has_not_seen():
    generator = torch.Generator().manual_seed(0)
    z, regressors = (torch.randn(96, n, generator=generator) for n in (12, 40))  # nothing is told, but much is fitted
    left = z.clone()
    with workers() as pool:
        take_prior_of_others(pool, left, regressors.__getitem__, torch.arange(96), 12)
    assert left.square().mean() > z.square().mean()
