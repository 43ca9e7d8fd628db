"""Caches from elsewhere, which a SketchCache takes over."""

import pytest
import torch
from checked_caches import shift, write
from joint_operators import operator_of
from small_models import model_of, padded_batch
from transformers import DynamicCache, StaticCache

from cachemedic.token.cache import SketchCache
from cachemedic.token.look_after import look_after

MODELS = ["gpt2", "llama", "gpt_neox", "phi", "qwen3", "opt"]
SAMPLING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
}


def test_a_sliding_window_that_is_looked_after_drops_no_token():
    model = model_of("mistral")
    ids = torch.arange(1, 25).view(2, 12)
    windowed = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=windowed)
    cache = look_after(model, windowed, ids[:, :5], operator_of("mistral"))
    found = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 12)]
    torch.testing.assert_close(torch.cat(found, 1), model(ids).logits[:, 5:], atol=1e-4, rtol=1e-4)
    assert not cache.check()
    cache.layers[1].keys[0, :, 3] = torch.nan
    assert cache.repair("auto").ways == {"estimate": 1}  # behind the window tokens are not computed again
    with pytest.raises(ValueError, match="layers that attend to the last 6 tokens only, and the cache holds 12"):
        cache.repair("recompute")


@pytest.mark.parametrize("storage", [DynamicCache, lambda: StaticCache(model_of("llama").config, max_cache_len=20)])
def test_a_cache_from_elsewhere_is_looked_after(storage):
    model, operator = model_of("llama"), operator_of("llama")
    ids, mask = padded_batch(length=18)
    found = storage()
    write(model, found, ids, mask, [18])
    expected = SketchCache(model, operator)
    write(model, expected, ids, mask, [18])
    with torch.inference_mode():  # attention over room for more tokens may round the last bits in another way
        for theirs, ours in zip(found.layers, expected.layers, strict=True):
            theirs.keys[:, :, :18], theirs.values[:, :, :18] = ours.keys, ours.values
    cache = look_after(model, found, ids, operator, mask)
    for name, x in cache.record.tensors.items():
        assert torch.equal(x, expected.record.tensors[name]), name
    shift(cache, 0, [5])
    assert cache.repair().ways == {"recompute": 1}
    new = torch.full((3, 1), 5)
    call = {"attention_mask": torch.cat([mask, torch.ones_like(new)], 1), "position_ids": mask.sum(1, keepdim=True)}
    logits = model(new, past_key_values=cache, **call).logits
    torch.testing.assert_close(logits, model(new, past_key_values=expected, **call).logits, atol=1e-4, rtol=1e-4)
    assert not cache.check()


def test_a_cache_that_is_not_of_the_ids_is_not_looked_after():
    model = model_of("llama")
    ids, mask = padded_batch(length=9)
    found = DynamicCache()
    write(model, found, ids, mask, [9])
    with pytest.raises(ValueError, match=r"ids must be \[3, 9\], as the cache has it, not \[3, 10\]"):
        look_after(model, found, padded_batch(length=10)[0], attention_mask=mask)
    with pytest.raises(ValueError, match="do not follow from their ids"):
        look_after(model, found, padded_batch(length=9, seed=2)[0], attention_mask=mask)
    with pytest.raises(ValueError, match="do not follow from their ids"):
        look_after(model, found, ids)  # the first row is right, the padded ones are at other positions
    with pytest.raises(ValueError, match="0 layers of this cache hold tokens"):
        look_after(model, DynamicCache(), ids)
