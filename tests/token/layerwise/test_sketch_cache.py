"""The cache of families D and E: its codes, generation over it, and what a scrub repairs."""

import pytest
import torch
from sketch_caches import NEW, assert_sound, filled, protected, write
from small_models import VOCABULARY, padded_batch
from transformers import DynamicCache, StaticCache

from cachemedic import CorruptionSpec, corrupt_cache, protect
from cachemedic.defenses.defense import CachedTokens
from cachemedic.models.cache import stack_cache
from cachemedic.token.layerwise.scrub import Scrubber
from cachemedic.token.layerwise.sketch_cache import SketchCache
from cachemedic.token.scalar_codes import pack

MODELS = ["gpt2", "llama", "gpt_neox", "phi", "qwen3", "opt", "mistral"]
SAMPLING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize(
    ("name", "known_layers"), [*((name, 1) for name in MODELS), ("gpt2", 0), ("gpt2", 2), ("llama", 0), ("llama", 2)]
)
def test_codes_do_not_depend_on_how_the_tokens_come(name, known_layers):
    model, operator = protected(name, known_layers=known_layers)
    ids, mask = padded_batch(length=12)
    caches = []
    for ends in ([12], [5, 12], range(1, 13)):
        cache = SketchCache(model, operator)
        with protect(model, operator):
            write(model, cache, ids, mask, ends)
        assert_sound(cache)
        caches.append(cache)
    k, v = stack_cache(caches[0])
    codes = Scrubber(model, operator).write(
        CachedTokens.behind_padding(k, v, ids, mask.bool())
    )  # of the whole cache at once
    bits = operator.code.bits.flatten()
    assert torch.equal(caches[0].record.sketch, pack(torch.cat(codes, -1), bits))
    for cache in caches[1:]:  # rounding of keys may move a number over the edge of a cell
        assert (cache.record.sketch != caches[0].record.sketch).double().mean() < 0.01
    assert caches[0].sketch_bytes() == 3 * 12 * caches[0].bytes_per_token
    assert caches[0].bytes_per_token == -(-int(bits.sum()) // 8)


@pytest.mark.parametrize("storage", ["dynamic", "static"])
@pytest.mark.parametrize("mode", SAMPLING)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_generation_over_sound_memory_is_that_of_the_model(name, mode, storage):
    model, operator = protected(name)
    ids, mask = padded_batch()
    static = StaticCache(model.config, max_cache_len=ids.shape[1] + NEW) if storage == "static" else None
    call = {"attention_mask": mask, "max_new_tokens": NEW, **SAMPLING[mode]}
    torch.manual_seed(3)
    expected = model.generate(ids, **call)
    cache = SketchCache(model, operator, scrub="every", cache=static)
    torch.manual_seed(3)
    with protect(model, operator):
        assert torch.equal(model.generate(ids, past_key_values=cache, **call), expected)
    assert len(cache.record) == cache.get_seq_length() == expected.shape[1] - 1
    assert_sound(cache)


def damaged(name, kind, parameter, layers="all", **options):
    """A model and its operator, a cache and a damaged copy of it, and the batch that goes on behind them."""
    model, operator, cache, ids, mask = filled(name, **options)
    *_, donor, _, _ = filled(name, length=14, **options)
    bad = corrupt_cache(cache, CorruptionSpec(kind, parameter=parameter, layers=layers), seed=1, donor=donor)
    generator = torch.Generator().manual_seed(4)
    new = torch.randint(1, VOCABULARY, (3, 5), generator=generator)
    return model, operator, cache, bad, torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)


def unprotected(cache):
    """What the cache stores, in a cache that nobody looks after."""
    plain = DynamicCache()
    for number, layer in enumerate(cache.layers):
        plain.update(layer.keys, layer.values, number)
    return plain


DAMAGE = {"gaussian": 2.0, "dropout_zero": 0.8, "contiguous_overwrite": 6, "bitflip_sparse": 0.3}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["gpt2", "llama", "phi"])
def test_generation_over_damage_that_the_ids_tell_of_is_that_over_sound_memory(name, kind):
    model, operator, cache, bad, ids, mask = damaged(name, kind, DAMAGE[kind], layers=[0, 1], known_layers=2)
    call = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, **call)
    assert not torch.equal(model.generate(ids, past_key_values=unprotected(bad), **call), expected)
    with protect(model, operator):
        assert torch.equal(model.generate(ids, past_key_values=bad, **call), expected)
    assert bad.report.changed[0] > 0
    assert_sound(cache)  # the original is another cache


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_the_code_repairs_what_the_ids_do_not_tell(name, kind):
    model, operator, cache, bad, ids, mask = damaged(name, kind, DAMAGE[kind])

    def logits(read):
        return write(model, read, ids, mask, [ids.shape[1]]).log_softmax(-1)

    broken = logits(unprotected(bad))
    with protect(model, operator):
        clean, repaired = logits(cache), logits(bad)
    divergence = [(clean.exp() * (clean - other)).sum(-1).mean() for other in (broken, repaired)]
    assert divergence[0] > 0.1
    assert divergence[1] < 0.02 * divergence[0]


@pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])
@pytest.mark.parametrize("static", [False, True])
def test_what_is_not_finite_never_reaches_the_logits(static, family):
    storage = StaticCache(protected("llama")[0].config, max_cache_len=20) if static else None
    model, operator, cache, ids, mask = filled("llama", storage=storage, family=family)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        for stored in (layer.keys, layer.values):
            words = stored.view(torch.int32)
            hit = torch.rand(stored.shape, generator=generator) < 0.2
            words ^= torch.where(hit, 1 << 30, 0).int()  # the highest bit of the exponent
            stored[:, :, 3] = torch.nan
            stored[0, :, 0] = torch.inf  # a token of padding: in memory all the same
    assert not torch.isfinite(cache.layers[0].keys).all()
    cache.mark_loaded()
    token = torch.tensor([[5], [6], [7]])
    with protect(model, operator):
        logits = write(model, cache, torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1), [13])
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all() for layer in cache.layers)
