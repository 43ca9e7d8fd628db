"""Repair within a budget: which way each token goes."""

import pytest
import torch
from checked_caches import LENGTH, SLOTS, damaged, filled, shift
from small_models import VOCABULARY
from transformers import AutoModelForCausalLM, BloomConfig

from cachemedic.token import policy
from cachemedic.token.cache import SketchCache
from cachemedic.token.costs import CostModel, costs_of


def fixed_costs(cache, **by_way):
    """A token computed again takes 1, a prefill as many as there are tokens."""
    seconds = {way: (0.0, a_token) for way, a_token in by_way.items()}
    return lambda model, coder, ways: CostModel(0.0, 1.0, 0.0, seconds)


@pytest.mark.parametrize(
    ("budget", "ways"),
    [
        (1.0, {"recompute": 6}),
        (6 / 40, {"recompute": 6}),
        (3.9 / 40, {"recompute": 3, "restore": 3}),
        (0.7 / 40, {"restore": 6}),
        (0.35 / 40, {"restore": 3, "erase": 3}),
        (0.15 / 40, {"restore": 1, "erase": 5}),
        (0.0, {"erase": 6}),
    ],
)
def test_auto_takes_the_best_way_that_there_is_time_for(monkeypatch, budget, ways):
    model, cache, before = damaged(restore=0.1, erase=2.0)
    monkeypatch.setattr(policy, "costs_of", fixed_costs(cache, restore=0.1, estimate=9.0))
    total = int((cache.record.positions >= 0).sum())
    report = cache.repair(budget=budget * LENGTH / total)
    assert report.ways == ways
    assert report.expected_share <= budget * LENGTH / total
    expected = (ways.get("restore", 0) * 0.1 + ways.get("erase", 0) * 2.0) / total
    assert report.expected_kl == pytest.approx(expected)
    assert report.way(0, 1) == next(iter(ways))  # a first position comes before all others
    assert not cache.check()
    if budget == 0:
        assert "budget: 0: there was no time to repair anything" in str(report)


@pytest.mark.parametrize("method", ["auto", "recompute"])
def test_a_budget_serves_an_operator_without_codes(method):
    model, cache, before = damaged(share=None)
    report = cache.repair(method, budget=1.0)
    assert sum(report.ways.values()) == len(SLOTS)
    assert report.expected_share <= 1


def test_a_budget_serves_a_model_without_a_longest_context():
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    cache = SketchCache(model)
    model(torch.arange(1, 9)[None], past_key_values=cache)
    shift(cache, 0, [3], layers=[0, 1])
    assert cache.repair(budget=0.5).ways == {"erase": 1}  # its bias by distance forbids recomputing


def test_a_budget_is_a_share_of_a_prefill_of_all_rows(monkeypatch):
    model, cache, _, mask = filled(length=LENGTH)
    for row in range(len(mask)):
        shift(cache, row, mask[row].nonzero().squeeze(1).tolist(), by=3.0)
    monkeypatch.setattr(policy, "costs_of", lambda *_: CostModel(0.0, 1.0, 0.0))
    report = cache.repair(budget=1.0)
    assert report.ways == {"recompute": int(mask.sum())}
    assert report.expected_share == pytest.approx(1)


def test_budget_0_leaves_what_is_hardly_damaged_and_says_so():
    model, cache, _, _ = filled(length=LENGTH)
    cache.layers[1].keys[0, 0, 20, 3] += 0.1
    cache.layers[1].keys[0, 0, 21, 3] = torch.nan
    shift(cache, 0, [30])
    for stored in (cache.layers[0].keys, cache.layers[2].values):
        stored[0, 0, 20, 3] += 0.0
    cache_parts = cache.check().parts[0, 20]
    assert cache_parts.sum() == 1
    report = cache.repair(budget=0)
    # one of six keys and values is more than an eighth of this small model's token
    assert report.ways == {"erase": 3}
    monkey = policy.MILD
    assert monkey < 1 / 6


def test_mildly_damaged_tokens_are_left(monkeypatch):
    monkeypatch.setattr(policy, "MILD", 0.2)
    model, cache, _, _ = filled(length=LENGTH)
    cache.layers[1].keys[0, 0, 20, 3] += 0.1
    cache.layers[1].keys[0, 0, 21, 3] = torch.nan
    report = cache.repair(budget=0)
    assert report.ways == {"erase": 1, "leave": 1}
    assert report.way(0, 20) == "leave"
    assert "left as they are" in str(report)
    assert cache.check().tokens == [(0, 20)]  # still said
    assert cache.repair().ways == {"recompute": 2}


def test_more_tokens_than_a_quarter_are_left_and_not_erased_unless_they_are_not_finite():
    model, cache, _, mask = filled(length=LENGTH)
    read = mask[0].nonzero().squeeze(1).tolist()
    for row in range(len(mask)):
        shift(cache, row, mask[row].nonzero().squeeze(1).tolist())
    cache.layers[1].keys[0, 0, read[5], 3] = torch.nan
    report = cache.repair(budget=0)
    assert report.ways == {"erase": 1, "leave": int(mask.sum()) - 1}
    assert report.way(0, read[5]) == "erase"


@pytest.mark.parametrize(
    ("restored", "ways"),
    [(0.1, {"restore": 3, "erase": 3}), (1.9, {"recompute": 1, "erase": 5})],
)
def test_the_way_that_saves_most_in_the_time_is_taken_where_there_is_not_time_for_all(monkeypatch, restored, ways):
    _, cache, _ = damaged(restore=restored, erase=2.0)
    monkeypatch.setattr(policy, "costs_of", fixed_costs(cache, restore=0.3, estimate=9.0))
    total = int((cache.record.positions >= 0).sum())
    assert cache.repair(budget=1.0 / total).ways == ways


def test_nothing_is_measured_where_nothing_is_damaged(monkeypatch):
    _, cache, _, _ = filled(length=LENGTH)
    monkeypatch.setattr(policy, "costs_of", None)
    assert not cache.repair(budget=0.1).found


def test_costs_are_measured_once_and_make_sense():
    model, cache, before = damaged()
    costs = costs_of(model, cache.coder, ("recompute", "restore"))
    assert costs_of(model, cache.coder, ("recompute", "restore")) is costs
    assert costs.prefill(64, 64) > 0
    assert costs.seconds("recompute", 10, 64) > 0
    assert costs.seconds("restore", 10, 64) >= 0
    assert costs.seconds("erase", 10, 64) == costs.seconds("recompute", 0, 64) == 0
    assert cache.repair(budget=100.0).ways == {"recompute": len(SLOTS)}


def test_a_budget_of_another_kind_is_refused_in_one_line():
    _, cache, _ = damaged()
    with pytest.raises(TypeError, match=r"a share of a prefill, not tensor\(\[\[0\.") as refused:
        cache.repair(budget=torch.zeros(2, 2))
    assert "\n" not in str(refused.value)
