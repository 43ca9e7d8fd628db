"""Hugging Face caches corrupted through the public API."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache

from cachemedic.corruption.apply import MIXTURE_WEIGHTS, corrupt_cache
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.models.cache import stack_cache

STRONG = {
    "gaussian": 1.5, "dropout_zero": 0.5, "orthogonal_rotation": 0.7, "bitflip_sparse": 0.3, "quant_noise": 2,
    "contiguous_overwrite": 4,
}  # fmt: skip

TINY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


def prefilled(model, seed: int = 0, positions: int = 12) -> DynamicCache:
    ids = torch.randint(1, 50, (2, positions), generator=torch.Generator().manual_seed(seed))
    return model(ids, use_cache=True).past_key_values


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", MIXTURE_WEIGHTS)
def test_a_cache_is_copied_and_decodes(llama, name):
    cache, donor = prefilled(llama), prefilled(llama, seed=1)
    k, v = stack_cache(cache)
    spec = CorruptionSpec(name, parameter=STRONG[name], layers=[0, 2])
    broken = corrupt_cache(cache, spec, seed=3, donor=donor)
    assert all(map(torch.equal, stack_cache(cache), (k, v)))
    k2, v2 = stack_cache(broken)
    assert all(map(torch.equal, stack_cache(corrupt_cache(cache, spec, seed=3, donor=donor)), (k2, v2)))
    assert (k2 != k).flatten(2).any(-1).tolist() == [[True, False, True]] * 2
    step = {"input_ids": torch.tensor([[4], [5]])}
    logits = llama(**step, past_key_values=broken).logits
    assert (logits - llama(**step, past_key_values=cache).logits).abs().max() > 1e-4
    assert cache.get_seq_length() == broken.get_seq_length() == 13


def test_the_identity_leaves_every_bit_of_a_cache(llama):
    cache = prefilled(llama)
    for spec in (CorruptionSpec("none"), CorruptionSpec("gaussian", severity=0)):
        assert all(map(torch.equal, stack_cache(corrupt_cache(cache, spec)), stack_cache(cache)))


def test_sliding_windows_are_corrupted_layer_by_layer():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=6)).eval()
    cache = prefilled(model)
    assert cache.layers[0].keys.shape[2] == 5
    broken = corrupt_cache(cache, CorruptionSpec("dropout_zero", parameter=1.0, time=("old_only", 2)))
    assert type(broken.layers[0]) is type(cache.layers[0])
    kept = (broken.layers[0].keys == cache.layers[0].keys).all(-1)[0, 0]
    assert kept.tolist()[-2:] == [True, True]
    logits = model(torch.tensor([[4], [5]]), past_key_values=broken).logits
    assert torch.isfinite(logits).all()
    assert broken.get_seq_length() == 13


def test_caches_that_cannot_be_corrupted_are_refused(llama):
    spec = CorruptionSpec("gaussian", parameter=1.0)
    with pytest.raises(ValueError, match="empty"):
        corrupt_cache(DynamicCache(), spec)
    with pytest.raises(ValueError, match="empty"):
        corrupt_cache(DynamicCache(config=llama.config), spec)
    with pytest.raises(TypeError, match="StaticLayer"):
        corrupt_cache(StaticCache(config=llama.config, max_cache_len=8), spec)
    overwrite = CorruptionSpec("contiguous_overwrite", parameter=2)
    with pytest.raises(ValueError, match="needs a donor"):
        corrupt_cache(prefilled(llama), overwrite)
    with pytest.raises(ValueError, match="empty"):
        corrupt_cache(prefilled(llama), overwrite, donor=DynamicCache())
