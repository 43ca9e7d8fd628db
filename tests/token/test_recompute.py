"""Damaged tokens computed again from their ids are those of a clean prefill."""

import copy

import pytest
import torch
import transformers as hf
from small_models import CONFIGS, VOCABULARY, model_of, padded_batch
from transformers import DynamicCache, StaticCache

from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.token import recompute as recompute_module
from cachemedic.token.cache import SketchCache
from cachemedic.token.recompute import recompute

PATTERNS = {
    "one row": [(1, 5)],
    "several": [(0, 0), (0, 3), (1, 2), (1, 5), (1, 4), (2, 4), (2, 5)],
    "all of a row": [(0, 1), *((1, slot) for slot in range(6))],
    "all": [(row, slot) for row in range(3) for slot in range(6)],
}


def prefilled(name, implementation="sdpa", length=6, cache=None):
    """A model, its clean cache of a left-padded batch, and the batch; short enough for every sliding window."""
    model = model_of(name, implementation)
    ids, mask = padded_batch(length=length)
    cache = DynamicCache() if cache is None else cache(model.config)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return model, cache, ids, mask


def at(pattern, ids):
    """The places of a pattern as a boolean tensor."""
    damaged = torch.zeros_like(ids, dtype=torch.bool)
    damaged[tuple(torch.tensor(pattern).T)] = True
    return damaged


def destroy(cache, damaged, value=torch.nan):
    """A copy of a cache with other numbers in place of the damaged tokens."""
    bad = copy.deepcopy(cache)
    for layer in bad.layers:
        for stored in (layer.keys, layer.values):
            stored.transpose(1, 2)[:, : damaged.shape[1]][damaged] = value
    return bad


def assert_same(found, expected, valid, tolerance=1e-5):
    for x, y in zip(found.layers, expected.layers, strict=True):
        for side in ("keys", "values"):
            a, b = (getattr(layer, side).transpose(1, 2)[:, : valid.shape[1]] for layer in (x, y))
            torch.testing.assert_close(a[valid], b[valid], atol=tolerance, rtol=tolerance)
            assert torch.isfinite(a).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_pattern_in_a_padded_batch(name, pattern, implementation):
    model, clean, ids, mask = prefilled(name, implementation)
    damaged = at(PATTERNS[pattern], ids)
    bad = destroy(clean, damaged)
    recompute(model, bad, ids, damaged, mask)
    assert_same(bad, clean, mask.bool())
    sound = ~damaged
    for x, y in zip(bad.layers, clean.layers, strict=True):
        assert torch.equal(x.keys.transpose(1, 2)[sound], y.keys.transpose(1, 2)[sound])
        assert torch.equal(x.values.transpose(1, 2)[sound], y.values.transpose(1, 2)[sound])


def test_it_is_repeatable_bit_for_bit():
    model, clean, ids, mask = prefilled("llama")
    damaged = at(PATTERNS["several"], ids)
    results = []
    for value in (torch.nan, 7.0):
        bad = destroy(clean, damaged, value)
        recompute(model, bad, ids, damaged, mask)
        results.append(stack_cache(bad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


STORAGE = {
    "static": lambda config: StaticCache(config, max_cache_len=11),
    "dynamic": lambda config: DynamicCache(config=config),  # with sliding layers where the model has some
}


@pytest.mark.parametrize(
    ("name", "storage"),
    [("gpt2", "static"), ("gpt2", "dynamic"), ("llama", "static"), ("llama", "dynamic"), ("gemma3", "dynamic")],
)
def test_other_storage(name, storage):
    model, clean, ids, mask = prefilled(name, length=5, cache=STORAGE[storage])
    damaged = at([(0, 1), (2, 4)], ids)
    bad = destroy(clean, damaged)
    recompute(model, bad, ids, damaged, mask)
    assert_same(bad, clean, mask.bool())


def test_many_tokens_are_computed_in_pieces(monkeypatch):
    monkeypatch.setattr(recompute_module, "PIECE", 3)
    monkeypatch.setattr(recompute_module, "BLOCK", 4)
    model, clean, ids, mask = prefilled("llama", length=12)
    damaged = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    bad = destroy(clean, damaged)
    recompute(model, bad, ids, damaged, mask)
    assert_same(bad, clean, mask.bool())


def test_decoding_goes_on_as_over_the_clean_cache():
    model, clean, ids, mask = prefilled("qwen3", length=9)
    damaged = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    bad = destroy(clean, damaged)
    recompute(model, bad, ids, damaged, mask)
    assert damaged.any(1).all()
    call = {"attention_mask": torch.cat([mask, torch.ones(3, 1).long()], 1), "position_ids": mask.sum(1, keepdim=True)}
    new = torch.full((3, 1), 5)
    torch.testing.assert_close(
        model(new, past_key_values=bad, **call).logits, model(new, past_key_values=clean, **call).logits
    )


def test_positions_that_were_numbered_otherwise():
    model = model_of("gpt2")
    ids, mask = padded_batch(length=6)
    positions = torch.arange(6).expand(3, -1)  # padding is numbered too
    clean = model(ids, attention_mask=mask, position_ids=positions).past_key_values
    damaged = at([(1, 3), (2, 5)], ids)
    bad = destroy(clean, damaged)
    recompute(model, bad, ids, damaged, mask, positions)
    assert_same(bad, clean, mask.bool())


def test_damaged_padding_is_cleared_and_nothing_else_happens():
    model, clean, ids, mask = prefilled("llama")
    damaged = at([(2, 0)], ids)
    bad = destroy(clean, damaged)
    recompute(model, bad, ids, damaged, mask)
    assert all((layer.keys[2, :, 0] == 0).all() for layer in bad.layers)
    assert_same(bad, clean, mask.bool())


def small(config):
    return hf.AutoModelForCausalLM.from_config(config).eval()


def test_what_cannot_be_computed_again_is_refused_with_its_reason():
    model, clean, ids, mask = prefilled("llama", length=9)
    none = torch.zeros_like(ids, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"damaged must be \[3, 9\], as the cache has it, not \[3, 8\]"):
        recompute(model, clean, ids, none[:, 1:])
    with pytest.raises(TypeError, match="must be a boolean tensor, not torch.int64"):
        recompute(model, clean, ids, none.long())
    with pytest.raises(ValueError, match="0 layers of this cache hold tokens; the model has 3 layers"):
        recompute(model, DynamicCache(), ids, none)
    with pytest.raises(ValueError, match="training mode"):
        recompute(model.train(), clean, ids, none)
    model.eval()
    mistral, windowed, *_ = prefilled("mistral", length=9)
    with pytest.raises(ValueError, match="attend to the last 6 tokens only, and the cache holds 9"):
        recompute(mistral, windowed, ids, none)
    dropped = DynamicCache(config=mistral.config)
    mistral(ids, past_key_values=dropped)
    with pytest.raises(ValueError, match="sliding window of 6 tokens has dropped the first of 9 tokens"):
        recompute(mistral, dropped, ids, none)
    with pytest.raises(TypeError, match="EncoderDecoderCache does not|in `layers`"):
        recompute(model, hf.EncoderDecoderCache(DynamicCache(), DynamicCache()), ids, none)


def test_other_kinds_of_model_are_refused_with_their_reason():
    ids = torch.randint(1, VOCABULARY, (1, 4))
    none = torch.zeros_like(ids, dtype=torch.bool)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    mamba = small(hf.MambaConfig(**sizes, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM has layers with no attention"):
        recompute(mamba, DynamicCache(config=mamba.config), ids, none)
    deepseek = small(
        hf.DeepseekV3Config(
            **sizes, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
            n_group=1, topk_group=1,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="multi-head latent attention"):
        recompute(deepseek, deepseek(ids).past_key_values, ids, none)
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1))
    with pytest.raises(ValueError, match="t5 has an encoder"):
        recompute(t5, DynamicCache(), ids, none)
    bloom = small(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="ALiBi"):
        recompute(bloom, bloom(ids).past_key_values, ids, none)


def test_ids_of_another_text_are_refused():
    model, clean, ids, mask = prefilled("llama")
    damaged = at([(0, 2)], ids)
    bad = destroy(clean, damaged)
    before = stack_cache(bad)
    other = ids.clone()
    other[1, 3] = other[1, 3] % (VOCABULARY - 1) + 1
    message = "1 tokens that are not damaged do not follow from their ids and positions, first of them slot 3 of row 1"
    with pytest.raises(ValueError, match=message):
        recompute(model, bad, other, damaged, mask)
    shifted = (mask.cumsum(1) - 1).clamp_min(0) + 20
    with pytest.raises(ValueError, match="do not follow from their ids and positions"):
        recompute(model, bad, ids, damaged, mask, shifted)
    destroyed = destroy(clean, at([(0, 2), (2, 5)], ids))
    with pytest.raises(ValueError, match="slot 5 of row 2"):
        recompute(model, destroyed, ids, damaged, mask)
    assert torch.equal(torch.stack(before).nan_to_num(), torch.stack(stack_cache(bad)).nan_to_num())  # nothing was done


def test_layers_that_do_not_all_attend_are_refused():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    lfm2 = small(hf.Lfm2Config(**sizes, **heads, full_attn_idxs=[1]))
    ids = torch.randint(1, VOCABULARY, (1, 4))
    with pytest.raises(ValueError, match="has layers with conv, which do not keep the keys and values of every token"):
        recompute(lfm2, DynamicCache(config=lfm2.config), ids, torch.zeros_like(ids, dtype=torch.bool))
    with pytest.raises(ValueError, match="has layers with conv"):
        SketchCache(lfm2)


def test_the_original_of_stacked_tensors_is_left_as_it_is():
    model, clean, ids, mask = prefilled("llama")
    k, v = stack_cache(clean)
    before = k.clone()
    recompute(model, unstack_cache(k, v), ids, torch.ones_like(ids, dtype=torch.bool), mask)
    assert torch.equal(k, before)
