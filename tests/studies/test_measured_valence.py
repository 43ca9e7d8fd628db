"""Measured valence against a slow reference: one example at a time, without padding, by transformers' own outputs."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data import text
from cachemedic.data.task_data import TaskData
from cachemedic.data.tasks import mood_task, sentiment_task
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import CleanBank, clean_pass, tokens_of
from cachemedic.evaluation.evaluate import corrupt_examples
from cachemedic.models.cache import unstack_cache
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.measured_valence import measure_valence

HORIZON = 10
NONE, GAUSSIAN = CorruptionSpec("none"), CorruptionSpec("gaussian", parameter=1.0)


def feeling(hidden: torch.Tensor) -> torch.Tensor:
    mixing = torch.randn(hidden.shape[-1], 2, generator=torch.Generator().manual_seed(3)) / 5
    return torch.sigmoid(hidden @ mixing)


@dataclass(frozen=True, eq=False)
class Halved(Defense):
    """Reads half of what it finds, and not the oldest token."""

    def read(self, damaged, kept):
        readable = damaged.valid.clone()
        readable[torch.arange(len(readable)), readable.int().argmax(1)] = False
        return replace(damaged, k=damaged.k / 2, v=damaged.v / 2, readable=readable)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model()


@pytest.fixture(scope="module")
def padded() -> TaskData:
    task = sentiment_task(tiny_tokenizer(), seeds=(3, 5), n=2)
    assert not task.prefix_mask.all()
    return task


@pytest.fixture(scope="module")
def clean(model, padded) -> CleanBank:
    return clean_pass(model, padded)


@torch.no_grad()
def slow(model, task: TaskData, clean: CleanBank, row: int, k, v, skipped: int = 0) -> list[float]:
    """`COLUMNS` of one example; its first `skipped` tokens are hidden."""
    prefix = task.prefix_ids[row][task.prefix_mask[row]]
    scored, length = task.target_mask[row], len(prefix)

    def run(keys, values, ids, skip):
        cache = unstack_cache(*(x[None, ..., -length + skip :, :] for x in (keys, values)))
        positions = torch.arange(length, length + len(ids))[None]
        output = model(ids[None], past_key_values=cache, position_ids=positions, output_hidden_states=True)
        return feeling(output.hidden_states[-1][0])[:, 0], output.logits[0]

    def of(keys, values, skip):
        forced = run(keys, values, task.continuation_ids[row], skip)[0][scored]
        ids = task.continuation_ids[row, :1]
        for _ in range(HORIZON):
            along, logits = run(keys, values, ids, skip)
            ids = torch.cat([ids, logits[-1:].argmax(-1)])
        output = model(torch.cat([prefix, ids])[None], output_hidden_states=True)
        return forced, along.mean(), feeling(output.hidden_states[-1][0, -1])[0]

    teacher = of(clean.k[row], clean.v[row], 0)
    student = of(k, v, skipped)
    gap = (student[0] - teacher[0]).abs().mean()
    return [float(x) for x in (gap, student[1], teacher[1], student[2], teacher[2])]


COLUMNS = ["gap", "projected", "projected_teacher", "sentiment", "sentiment_teacher"]


def test_it_is_what_a_plain_pass_finds(model, padded, clean) -> None:
    rows = measure_valence(model, padded, clean, GAUSSIAN, {"none": NoDefense(), "halved": Halved()}, feeling, HORIZON)
    k, v, _ = corrupt_examples(clean, padded, GAUSSIAN, np.arange(4))
    for name, share, skipped in (("none", 1.0, 0), ("halved", 0.5, 1)):
        own = rows[rows["reader"] == name]
        assert own["seed"].tolist() == [3, 3, 5, 5]
        assert own["example"].tolist() == [0, 1, 0, 1]
        for row in range(4):
            expected = slow(model, padded, clean, row, k[row] * share, v[row] * share, skipped)
            np.testing.assert_allclose(own[COLUMNS].to_numpy()[row], expected, rtol=1e-3, atol=1e-4)
    assert (rows["gap"] > 1e-3).all()


def test_an_operator_acts_while_the_student_reads_but_not_on_the_judge(model, padded, clean) -> None:
    both = RepairOperator.create("A", model.config, [0, 2], rank=2, runs=2, seed=[0, 1])
    draws = torch.Generator().manual_seed(0)
    for parameter in both.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=draws)
    rows = measure_valence(model, padded, clean, NONE, {"both": both}, feeling, HORIZON)
    written = tokens_of(padded, clean.k, clean.v)
    for run, at in ((0, 1), (1, 2)):  # run 1 repairs the second seed
        own = both.select(run)
        with torch.no_grad(), own.attach(model):
            ids = padded.continuation_ids[at : at + 1]
            mask = torch.cat([padded.prefix_mask[at], torch.ones(ids.shape[1], dtype=torch.bool)])[None].long()
            positions = padded.prefix_mask[at].sum() + torch.arange(ids.shape[1])[None]
            cache = unstack_cache(written.k[at : at + 1], written.v[at : at + 1])
            output = model(
                ids, attention_mask=mask, past_key_values=cache, position_ids=positions, output_hidden_states=True
            )
        student = feeling(output.hidden_states[-1][0])[:, 0]
        teacher = slow(model, padded, clean, at, clean.k[at], clean.v[at])
        plain = model(
            torch.cat([padded.prefix_ids[at][padded.prefix_mask[at]], ids[0]])[None], output_hidden_states=True
        )
        along = feeling(plain.hidden_states[-1][0, -ids.shape[1] :])[:, 0]
        scored = padded.target_mask[at]
        found = rows.iloc[at]
        assert found["gap"] == pytest.approx(float((student - along).abs()[scored].mean()), rel=1e-3)
        assert found["projected_teacher"] == pytest.approx(teacher[2], rel=1e-3)
        assert found["sentiment_teacher"] == pytest.approx(teacher[4], rel=1e-3)


def test_a_sound_cache_has_the_valence_of_its_teacher(model, padded, clean) -> None:
    rows = measure_valence(model, padded, clean, NONE, {"none": NoDefense()}, feeling, HORIZON)
    assert (rows["gap"] == 0).all()
    assert (rows["projected"] == rows["projected_teacher"]).all()
    assert (rows["sentiment"] == rows["sentiment_teacher"]).all()
    assert rows["sentiment"].between(0, 1).all()


def test_a_horizon_out_of_range_is_an_error(model, padded, clean) -> None:
    with pytest.raises(ValueError, match="horizon must be 10 to 30 steps, not 9"):
        measure_valence(model, padded, clean, NONE, {"none": NoDefense()}, feeling, 9)


def test_texts_of_one_mood() -> None:
    tokenizer = tiny_tokenizer()
    review = mood_task(tokenizer, n=6, prefix=300, scored=8).prefix_ids
    for row, ids in enumerate(review):  # a whole review of the wrong label would have most adjectives of the other mood
        words = re.findall(r"\w+", tokenizer.decode(ids))
        positive, negative = (sum(word in lexicon for word in words) for lexicon in (text.POSITIVE, text.NEGATIVE))
        assert (positive > negative) == (row % 2 == 1)
    task = mood_task(tokenizer, seeds=(0, 1), n=2, prefix=60, scored=8)
    assert task.prefix_ids.shape == (4, 60)
    assert task.target_mask.sum(1).tolist() == [8] * 4
    assert torch.equal(task.prefix_ids, mood_task(tokenizer, seeds=(0, 1), n=2, prefix=60, scored=8).prefix_ids)
    other = mood_task(tokenizer, seeds=(0, 1), n=2, split="validation", prefix=60, scored=8)
    assert len(torch.cat([task.prefix_ids, other.prefix_ids]).unique(dim=0)) == 8
