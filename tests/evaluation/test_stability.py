"""Sensitivity and amplification against one example, one head and one decode at a time."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from small_models import shaken
from tiny_repair import base_of, calibrated

from cachemedic.core.seeds import generator
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.heuristics import NoDefense, Reset, Smoothing
from cachemedic.evaluation import stability
from cachemedic.evaluation.decoding import clean_pass, tokens_of
from cachemedic.models.cache import unstack_cache
from cachemedic.repair.attach import protect
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.token_repair import TokenRepair

TOP = 50


@pytest.fixture(autouse=True)
def few_logits(monkeypatch):
    monkeypatch.setattr(stability, "TOP", TOP)  # fewer than there are: which ones matters


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request):
    model, tokenizer = base_of(request.param).model, tiny.tiny_tokenizer()
    task = perplexity_task(tokenizer, tiny.DOCUMENTS, (3, 7), n=2, prefix=10, scored=3)
    task.prefix_mask[1, :4] = False  # one example with padding on the left
    operator = shaken(RepairOperator.create("A", model.config, layers=(1, 2), rank=3, runs=2))
    repair = TokenRepair(model, calibrated(request.param, "E", runs=2))
    readers = {"none": NoDefense(), "smoothing": Smoothing(), "A": operator, "E": repair}
    return model, task, clean_pass(model, task), readers


def slow_logits(model, task, clean, example, k, v, reader):
    """All logits [M, V] of one example."""
    row, context = task.select(slice(example, example + 1)), torch.no_grad()
    run = example // (len(task) // reader.runs)
    if isinstance(reader, RepairOperator):
        context = protect(model, reader.select(run))
    else:
        alone = TokenRepair(model, reader.operator.select(run)) if isinstance(reader, TokenRepair) else reader
        kept = alone.write(clean.tokens(task, slice(example, example + 1)))
        read = alone.read(tokens_of(row, k, v), kept)
        k, v = read.k, read.v
    read = row.continuation_ids.shape[1]
    mask = torch.cat([row.prefix_mask, torch.ones(1, read, dtype=torch.bool)], 1).long()
    with torch.no_grad(), context:
        return model(
            row.continuation_ids, past_key_values=unstack_cache(k, v), attention_mask=mask,
            position_ids=mask.cumsum(1)[:, -read:] - 1,
        ).logits[0]  # fmt: skip


def slow_distance(task, clean, example, z, reference):
    norms = []
    for m in task.target_mask[example].nonzero().flatten().tolist():
        best = clean.logits[example, m].sort(descending=True).indices[:TOP]
        norms.append((z[m, best] - reference[m, best]).square().sum().sqrt().item())
    return np.mean(norms)


def slow_noise(what, task, clean, example, number):
    """Gaussian numbers, and the clean state, [L, G, T, d] each, zero at padding."""
    draws, pad = (
        generator("stability", what, int(task.seeds[example]), number, 0),
        int((~task.prefix_mask[example]).sum()),
    )
    noise, state = [], []
    for x in (clean.k[example], clean.v[example]):
        numbers = torch.randn(*x.shape[:2], x.shape[2] - pad, x.shape[3], generator=draws)
        noise.append(torch.cat([torch.zeros(*x.shape[:2], pad, x.shape[3]), numbers], 2))
        state.append(torch.where(task.prefix_mask[example][:, None], x, 0.0))
    return noise, state


def size(pair):
    return torch.cat([x.flatten() for x in pair]).norm()


def test_sensitivity_is_that_of_the_slow_loop(case):
    model, task, clean, readers = case
    fast = stability.sensitivity(model, task, clean, readers, levels=(0.0, 0.3)).set_index(["reader", "noise", "seed"])
    for name, reader in readers.items():
        for level in (0.0, 0.3):
            found = []
            for example in range(4):
                (dk, dv), (k, v) = slow_noise("layer", task, clean, example, example % 2)
                k_hit, v_hit = clean.k[example].clone(), clean.v[example].clone()
                for layer in range(len(k)):
                    scale = level * size((k[layer], v[layer])) / size((dk[layer], dv[layer]))
                    k_hit[layer] += scale * dk[layer]
                    v_hit[layer] += scale * dv[layer]
                z = slow_logits(model, task, clean, example, k_hit[None], v_hit[None], reader)
                own = slow_logits(model, task, clean, example, clean.k[[example]], clean.v[[example]], reader)
                found.append([slow_distance(task, clean, example, z, x) for x in (own, clean.logits[example])])
            for i, seed in enumerate((3, 7)):
                row, expected = fast.loc[(name, level, seed)], np.mean(found[2 * i : 2 * i + 2], axis=0)
                assert row[["sensitivity", "distance"]].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
                assert (row.n_examples, row.top, row.draws) == (2, TOP, 1)


def test_amplification_is_that_of_the_slow_loop(case):
    model, task, clean, readers = case
    fast = stability.amplification(model, task, clean, readers).set_index(["reader", "layer", "head", "seed"])["gamma"]
    layers, heads = clean.k.shape[1:3]
    assert len(fast) == len(readers) * layers * heads * 2
    for name, reader in readers.items():
        for layer, head in ((0, 1), (2, 0)):
            gammas = []
            for example in range(4):
                (dk, dv), (k, v) = slow_noise("head", task, clean, example, example % 2)
                norm = stability.HEAD_NOISE * size((k[layer, head], v[layer, head]))
                scale = norm / size((dk[layer, head], dv[layer, head]))
                k_hit, v_hit = clean.k[example].clone(), clean.v[example].clone()
                k_hit[layer, head] += scale * dk[layer, head]
                v_hit[layer, head] += scale * dv[layer, head]
                z = slow_logits(model, task, clean, example, k_hit[None], v_hit[None], reader)
                own = slow_logits(model, task, clean, example, clean.k[[example]], clean.v[[example]], reader)
                gammas.append(slow_distance(task, clean, example, z, own) / (norm.item() + 1e-8))
            for i, seed in enumerate((3, 7)):
                expected = np.median(gammas[2 * i : 2 * i + 2])
                assert fast[name, layer, head, seed] == pytest.approx(expected, rel=2e-3, abs=1e-5)


def test_a_code_of_the_clean_cache_brings_noisy_logits_back(case):
    model, task, clean, readers = case
    rows = stability.sensitivity(model, task, clean, readers, levels=(1.0,)).groupby("reader").mean()
    assert rows.loc["E", "distance"] < rows.loc["none", "distance"]
    # at rest it is the identity
    assert rows.loc["E", "sensitivity"] == pytest.approx(rows.loc["E", "distance"], rel=1e-3)


def test_without_noise_nothing_moves_but_a_repair_may_differ_from_the_clean_model(case):
    model, task, clean, readers = case
    rows = stability.sensitivity(model, task, clean, readers, levels=(0.0,)).groupby("reader").mean()
    assert rows["sensitivity"].max() == 0
    assert rows.loc["none", "distance"] == pytest.approx(0, abs=1e-4)
    assert rows.loc["A", "distance"] > 0.1


def test_a_reader_that_ignores_the_cache_is_insensitive_but_far_from_the_clean_model(case):
    model, task, clean, _ = case
    readers = {"none": NoDefense(), "reset": Reset()}
    rows = stability.sensitivity(model, task, clean, readers, levels=(0.1,), draws=2).groupby("reader").mean()
    assert rows.loc["reset", "sensitivity"] == pytest.approx(0, abs=1e-4)
    assert rows.loc["reset", "distance"] > rows.loc["none", "distance"]


def test_draws_are_independent_and_averaged(case):
    model, task, clean, readers = case
    one, two = (stability.sensitivity(model, task, clean, readers, levels=(0.3,), draws=n) for n in (1, 2))
    assert (two["draws"] == 2).all()
    assert (two["n_examples"] == one["n_examples"]).all()
    assert not np.allclose(one["sensitivity"], two["sensitivity"])
