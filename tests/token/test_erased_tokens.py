"""Erased tokens, and what is not a number where attention does not read."""

import pytest
import torch
from checked_caches import filled, numbers, shift
from joint_operators import operator_of
from small_models import VOCABULARY, model_of

from cachemedic.token.cache import SketchCache


def test_erased_tokens_are_read_no_more():
    model, cache, ids, mask = filled("gpt2", length=10)
    shift(cache, 1, [4, 6], by=5.0)
    report = cache.repair("erase")
    assert report.ways == {"erase": 2}
    assert report.expected_kl is None
    assert not cache.check()
    cache.layers[0].keys[1, :, 4] = 100.0  # nobody looks
    new = torch.full((3, 1), 5)
    seen = torch.cat([mask, torch.ones_like(new)], 1)
    position_ids = mask.sum(1, keepdim=True)
    found = model(new, attention_mask=seen, position_ids=position_ids, past_key_values=cache).logits
    seen[1, [4, 6]] = 0
    clean = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).past_key_values
    expected = model(new, attention_mask=seen, position_ids=position_ids, past_key_values=clean).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_erased_tokens_of_a_text_without_mask():
    model = model_of("llama")
    ids = torch.randint(1, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    cache = SketchCache(model)
    model(ids, past_key_values=cache)
    clean = model(ids).past_key_values
    shift(cache, 0, [3], by=5.0)
    cache.repair("erase")
    found = model(torch.tensor([[5]]), past_key_values=cache).logits
    seen = torch.ones(1, 9).long()
    seen[0, 3] = 0
    expected = model(torch.tensor([[5]]), attention_mask=seen, position_ids=torch.tensor([[8]]), past_key_values=clean)
    torch.testing.assert_close(found, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_not_a_number_is_read_no_more_once_it_is_erased(name):
    model, cache, ids, mask = filled(name, length=10)
    clean = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).past_key_values
    cache.layers[1].values[0, :, 4, 0] = torch.nan
    cache.layers[0].keys[0, :, 4] = torch.inf
    assert cache.repair("erase").ways == {"erase": 1}
    assert not cache.check()
    cache.layers[2].keys[0, :, 4, 1] = torch.nan  # erased tokens are looked after as well
    padding = int((mask[1] == 0).nonzero()[0])
    cache.layers[1].values[1, :, padding] = torch.nan  # attention multiplies what it does not read by zero
    found = cache.check()
    assert found.tokens == [(0, 4), (1, padding)]
    assert set(found.kinds) == {"not finite"}
    shift(cache, 1, [8], by=5.0)
    assert cache.repair("recompute", budget=100.0).ways == {"recompute": 1, "erase": 2}
    assert not cache.check()
    new, seen = torch.full((3, 1), 5), torch.cat([mask, torch.ones(3, 1).long()], 1)
    position_ids = mask.sum(1, keepdim=True)
    logits = model(new, attention_mask=seen, position_ids=position_ids, past_key_values=cache).logits
    seen[0, 4] = 0
    expected = model(new, attention_mask=seen, position_ids=position_ids, past_key_values=clean).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", ["no operator", 0.1])
def test_erased_tokens_are_said_and_can_be_computed_again(share):
    model = model_of("llama")
    ids = torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = SketchCache(model, None if share == "no operator" else operator_of("llama", share))
    model(ids, past_key_values=cache)
    before, codes = numbers(cache), cache.record.codes
    for layer in cache.layers:
        layer.keys[:, :, 5:] = 0.0
    cache.repair("erase")
    assert str(cache.check()).endswith(
        "10 tokens are as they were last written or repaired; 70 tokens are erased, and not read"
    )
    shift(cache, 0, [1])
    assert "70 tokens, which are not read" in str(cache.check())
    report = cache.repair()
    assert report.ways == {"recompute": 71}
    for found, expected in zip(numbers(cache), before, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert str(cache.check()) == "all 80 tokens are as they were last written or repaired"
    assert torch.equal(cache.record.codes, codes)


def test_codes_of_tokens_that_were_only_estimated_stay():
    model = model_of("llama")
    ids = torch.randint(1, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(0))
    cache = SketchCache(model, operator_of("llama", 0.1))
    model(ids, past_key_values=cache)
    codes = cache.record.codes
    shift(cache, 0, list(range(16, 24)), by=0.3)
    cache.repair("estimate")
    shift(cache, 0, [8, 30])
    cache.repair("erase")
    assert cache.repair().ways == {"recompute": 2}
    assert torch.equal(cache.record.codes[:, 16:24], codes[:, 16:24])
