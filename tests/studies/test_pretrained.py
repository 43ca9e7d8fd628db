"""What notebooks 17 and 18 run: balanced conditions, repair in a cache, and kinds of text."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import DOCUMENTS
from tiny_repair import base_of, calibrated
from tiny_training import linear_map

from cachemedic.core.severity_map import SeverityMap
from cachemedic.data.tasks import perplexity_task
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import CachedTokens
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import TYPES
from cachemedic.studies import pretrained
from cachemedic.studies.computing.frontier import InCache, Timed, faults
from cachemedic.token.token_recompute import TokenRecompute

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def task():
    return perplexity_task(base_of("llama").tokenizer, DOCUMENTS, SEEDS, 16, prefix=20, scored=2)


def test_each_example_meets_half_of_the_types_and_each_condition_as_many(task):
    conditions = list(pretrained.balanced(task))
    assert {(kind, severity) for kind, severity, _ in conditions} == {(k, s) for k in TYPES for s in pretrained.GRID}
    met = Counter((row, kind) for kind, _, rows in conditions for row in rows.tolist())
    assert set(met.values()) == {1}
    assert set(Counter(row for row, _ in met).values()) == {len(TYPES) // 2}
    for _, _, rows in conditions:
        assert Counter(task.seeds[rows].tolist()) == dict.fromkeys(SEEDS, 2)


def test_a_balanced_grid_goes_on_where_it_was(task, tmp_path, monkeypatch):
    base = base_of("llama")
    base = replace(base, severity_map=SeverityMap(linear_map(base.name, heads=2)))
    readers = {"none": NoDefense(), "recompute": TokenRecompute(base.model)}
    grid = pretrained.balanced_grid(base, task, readers, tmp_path)
    assert len(grid) == 2 * len(SEEDS) * (1 + len(TYPES) * len(pretrained.GRID))
    repaired = grid[grid.reader == "recompute"]
    assert (repaired.kl.abs() < 1e-5).all()
    assert (grid[(grid.reader == "none") & (grid.type == "dropout_zero")].kl > 1e-4).all()

    def computed(*args):
        raise AssertionError("what is finished is not computed again")

    monkeypatch.setattr(pretrained, "evaluate", computed)
    again = pretrained.balanced_grid(base, task, readers, tmp_path)
    assert again.kl.tolist() == pytest.approx(grid.kl.tolist())


@pytest.mark.parametrize("method", ["restore", "estimate", "recompute", "auto"])
def test_a_repaired_cache_reads_as_written_where_nothing_was_damaged(task, method):
    base, operator = base_of("llama"), calibrated("llama")
    clean = clean_pass(base.model, task).tokens(task)
    defense = Timed(InCache(base.model, None if method == "recompute" else operator, method))
    kept = defense.write(clean)
    k = clean.k.clone()
    k[:, :, :, 8] += 1
    read = defense.read(replace(clean, k=k), kept)
    sound = torch.arange(k.shape[3]) != 8
    assert torch.equal(read.k[:, :, :, sound], clean.k[:, :, :, sound])
    assert not torch.equal(read.k, k)
    if method == "recompute":
        torch.testing.assert_close(read.k, clean.k, rtol=1e-4, atol=1e-4)
    assert len(defense.seconds) == 1
    assert isinstance(read, CachedTokens)


def test_faults_hit_the_share_of_tokens_that_is_asked_for():
    found = faults(100, 0.1)
    assert found["noise"].share == 0.1
    assert found["another text"].parameter == 10


def test_operators_are_kept_until_the_text_or_the_code_that_calibrates_changes(tmp_path, monkeypatch):
    base, calls = base_of("llama"), []

    def counted(operator, *args):
        calls.append(operator.family)
        return calibrated("llama", family=operator.family)

    code = tmp_path / "code"
    code.mkdir()
    (code / "fit.py").write_text("STEPS = 400\n")
    monkeypatch.setenv("CACHEMEDIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "calibrate", counted)
    monkeypatch.setattr(pretrained, "source_texts", lambda base, source: DOCUMENTS)
    monkeypatch.setattr(pretrained, "CALIBRATES", code)
    made = pretrained.operators(base, TextSource())
    assert calls == ["D", "E"]
    again = pretrained.operators(base, TextSource())
    assert calls == ["D", "E"]
    assert {family: operator.digest for family, operator in again.items()} == {
        family: operator.digest for family, operator in made.items()
    }
    (code / "fit.py").write_text("STEPS = 1200\n")
    pretrained.operators(base, TextSource())
    assert calls == ["D", "E", "D", "E"]
