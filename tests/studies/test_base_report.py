"""What is reported of a base, against slow references on a tiny model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import DOCUMENTS, VOCABULARY, tiny_model, tiny_tokenizer

from cachemedic.data import text_source
from cachemedic.data.tasks import perplexity_task
from cachemedic.models.load import Base
from cachemedic.studies import base_report
from cachemedic.studies.base_report import BLOCK, Effort, proportion, scored_bytes, unigram_log_probabilities
from cachemedic.studies.drawing import figures

LONG = tuple(document * 6 for document in DOCUMENTS)
SMALL = Effort(
    perplexity=2, sentiment=3, needle=5, windows=3, unigram_tokens=500, contexts=(160, 224), window=3 * BLOCK
)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(tiny_model("llama"), tiny_tokenizer(), "tiny")


def nll(base: Base, ids: torch.Tensor) -> torch.Tensor:
    """Of every token of one text [T] but the first."""
    logits = base.model(ids[None]).logits[0, :-1]
    return F.cross_entropy(logits, ids[1:], reduction="none")


def test_unigram_counts_with_one_added(base: Base) -> None:
    logp = unigram_log_probabilities(base, ["a a", "a"], tokens=100)
    (first,), (_, again) = base.tokenizer("a")["input_ids"], base.tokenizer("a a")["input_ids"]
    assert logp.exp().sum() == pytest.approx(1)
    assert logp[first].exp() == pytest.approx(3 / (VOCABULARY + 3))
    assert logp[again].exp() == pytest.approx(2 / (VOCABULARY + 3))


def test_scored_bytes_are_those_of_the_text(base: Base) -> None:
    task = perplexity_task(base.tokenizer, LONG, n=3, prefix=20, scored=15)
    spelled = [base.tokenizer.decode(row) for row in task.target_ids[:, -15:]]
    assert scored_bytes(base, task) == [len(text.encode()) for text in spelled]


def test_language_scores_are_those_of_plain_forward_passes(base: Base) -> None:
    task = perplexity_task(base.tokenizer, LONG, seeds=(0, 1), n=2, prefix=20, scored=15)
    unigram = torch.full((VOCABULARY,), 1 / VOCABULARY).log()
    scores = base_report.language_scores(base, task, unigram)
    ids = torch.cat([task.prefix_ids, task.continuation_ids, task.target_ids[:, -1:]], 1)
    losses = torch.stack([nll(base, row)[-15:] for row in ids])
    assert scores["perplexity"].estimate == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert scores["perplexity of the unigram"].estimate == pytest.approx(VOCABULARY, rel=1e-4)
    bits = [float(part.sum()) / math.log(2) for part in losses.split(2)]
    sizes = np.array(scored_bytes(base, task)).reshape(2, 2).sum(1)
    assert scores["bits per byte"].estimate == pytest.approx(np.mean(bits / sizes), rel=1e-4)
    erased = math.log(scores["perplexity, prefix erased"].estimate / scores["perplexity"].estimate)
    assert scores["value of the context, nats per token"].estimate == pytest.approx(erased, rel=1e-3)


def test_short_reading_sees_two_blocks(base: Base) -> None:
    curve = base_report.nll_by_position(base, LONG, n=2, window=3 * BLOCK)
    task = perplexity_task(base.tokenizer, LONG, n=2, prefix=1, scored=3 * BLOCK - 1)
    ids = torch.cat([task.prefix_ids, task.continuation_ids, task.target_ids[:, -1:]], 1)
    whole = torch.stack([nll(base, row)[-BLOCK:].mean() for row in ids])
    short = torch.stack([nll(base, torch.cat([row[:1], row[-2 * BLOCK :]]))[-BLOCK:].mean() for row in ids])
    last = curve.iloc[-1]
    assert last["nll"] == pytest.approx(float(whole.mean()), rel=1e-4)
    assert last["saved"] == pytest.approx(float((short - whole).mean()), abs=1e-4)
    assert curve["nll_short"].isna().tolist() == [True, True, False]
    with pytest.raises(ValueError, match=f"window is 100; allowed are multiples of {BLOCK}"):
        base_report.nll_by_position(base, LONG, n=2, window=100)


def test_a_share_that_is_whole_still_has_an_interval() -> None:
    share = proportion(20, 20)
    assert share.estimate == 1
    assert share.high == pytest.approx(1)
    assert 0.8 < share.low < 0.9


def test_report_is_complete_and_can_be_drawn(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base_report, text_source):
        monkeypatch.setattr(module, "documentation", lambda split: LONG)
    report = base_report.measure(base, [0, 1], SMALL)
    assert report.facts["key/value heads"] == 2
    assert report.facts["licence"] is None
    assert len(report.scores) == 9
    assert report.scores["low"].le(report.scores["high"]).all()
    assert report.needle.groupby(["context", "reader"])["n_examples"].sum().eq(10).all()
    assert set(report.needle["context"]) == {160, 224}
    assert len(figures.base_models(report.positions, report.needle).axes) == 2
