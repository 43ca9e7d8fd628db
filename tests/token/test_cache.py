"""The cache that knows what was written: it follows its tokens, finds damage and mends it."""

import copy
import gc

import pytest
import torch
from checked_caches import NEW, filled, numbers, shift, write
from small_models import PAD, VOCABULARY, model_of, padded_batch
from transformers import DynamicCache, StaticCache

from cachemedic.corruption.apply import corrupt_cache
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.token.cache import SketchCache

MODELS = ["gpt2", "llama", "gpt_neox", "phi", "qwen3", "opt"]
SAMPLING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("name", MODELS)
def test_hashes_do_not_depend_on_how_the_tokens_come(name):
    model = model_of(name)
    ids, mask = padded_batch(length=12)
    for ends in ([12], [5, 12], range(1, 13)):
        cache = SketchCache(model)
        write(model, cache, ids, mask, ends)
        assert not cache.check()
        assert cache.report.read == int(mask.sum())
        assert str(cache.report) == "all 30 tokens are as they were last written or repaired"
        assert torch.equal(cache.record.ids, ids)
        assert torch.equal(cache.record.positions >= 0, mask.bool())


@pytest.mark.parametrize("storage", ["dynamic", "static"])
@pytest.mark.parametrize("mode", SAMPLING)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_is_that_of_the_model(name, mode, storage):
    model = model_of(name)
    ids, mask = padded_batch()
    static = StaticCache(model.config, max_cache_len=ids.shape[1] + NEW) if storage == "static" else None
    call = {"attention_mask": mask, "max_new_tokens": NEW, **SAMPLING[mode]}
    torch.manual_seed(3)
    expected = model.generate(ids, **call)
    cache = SketchCache(model, storage=static)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, past_key_values=cache, **call), expected)
    assert len(cache.record) == cache.get_seq_length() == expected.shape[1] - 1
    assert not cache.check()


@pytest.mark.parametrize("storage", [None, lambda config: StaticCache(config, max_cache_len=40)])
def test_logits_without_padding_are_those_of_plain_storage(storage):
    model = model_of("llama")
    ids, new = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0)), torch.full((3, 1), 5)
    plain = DynamicCache() if storage is None else storage(model.config)
    cache = SketchCache(model, storage=None if storage is None else storage(model.config))
    for tokens in (ids, new):
        expected = model(tokens, past_key_values=plain).logits
        assert torch.equal(model(tokens, past_key_values=cache).logits, expected)


def test_prompt_lookup_crops_and_goes_on():
    model = model_of("llama")
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    call = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 8, "do_sample": False}
    cache = SketchCache(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **call), model.generate(ids, **call))
    assert not cache.check()
    static = SketchCache(model, storage=StaticCache(model.config, max_cache_len=40))
    with pytest.raises(ValueError, match="StaticCache"):
        model.generate(ids, past_key_values=static, **call)


CHANGES = {
    "crop": (lambda cache: cache.crop(-4), [0, 1, 2], 8),
    "crop to one": (lambda cache: cache.crop(-11), [0, 1, 2], 1),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0], 12),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1], 12),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2], 12),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_follows_the_tokens(change):
    act, rows, length = CHANGES[change]
    model, cache, ids, mask = filled()
    act(cache)
    assert not cache.check()
    new = torch.randint(1, VOCABULARY, (len(rows), 3), generator=torch.Generator().manual_seed(2))
    ids, mask = torch.cat([ids[rows, :length], new], 1), torch.cat([mask[rows, :length], torch.ones_like(new)], 1)
    write(model, cache, ids, mask, range(length + 1, length + 4))
    assert torch.equal(cache.record.ids, ids)
    assert not cache.check()
    shift(cache, 0, [length + 1])
    assert cache.check().tokens == [(0, length + 1)]
    assert cache.repair("recompute").ways == {"recompute": 1}
    whole = SketchCache(model)
    write(model, whole, ids, mask, [length + 3])
    for x, y in zip(cache.layers, whole.layers, strict=True):
        valid = mask.bool()
        torch.testing.assert_close(x.keys.transpose(1, 2)[valid], y.keys.transpose(1, 2)[valid], atol=1e-4, rtol=1e-4)


def test_a_cache_that_was_reset_is_written_anew():
    model, cache, ids, mask = filled("gpt2")
    cache.reset()
    assert cache.get_seq_length() == 0
    write(model, cache, ids, mask, [12])
    assert not cache.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["auto", "recompute"])
def test_damage_is_found_and_computed_again(dtype, method):
    model, cache, ids, mask = filled(dtype=dtype)
    before = numbers(cache)
    shift(cache, 1, [4, 5], layers=[1])
    cache.layers[2].values[0, 1, 7, 3] *= -1
    report = cache.check()
    assert report.tokens == [(0, 7), (1, 4), (1, 5)]
    assert report.layers == [1, 2]
    assert report.parts[0, 7].nonzero().tolist() == [[2, 1]]
    repaired = cache.repair(method)
    assert repaired.ways == {"recompute": 3}
    assert repaired.way(1, 4) == "recompute"
    assert repaired.expected_kl == 0
    assert not cache.check()
    assert not cache.repair().found
    for x, y in zip(numbers(cache), before, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: corrupt_cache(c, CorruptionSpec("gaussian", parameter=1.0))]
)
def test_copies_are_of_their_own(copied):
    model, cache, ids, mask = filled()
    before = numbers(cache)
    other = copied(cache)
    longer, longer_mask = padded_batch(length=14)
    longer[:, :12] = ids
    if other.check():
        other.repair()
    write(model, other, longer, longer_mask, [14])
    assert not other.check()
    assert (len(cache.record), cache.get_seq_length()) == (12, 12)
    assert not cache.check()
    assert all(torch.equal(x, y) for x, y in zip(numbers(cache), before, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_static_storage_begins_with_one_token(name):
    model = model_of(name)
    ids, how = torch.tensor([[5], [7]]), {"max_new_tokens": 6, "do_sample": False}
    cache = SketchCache(model, storage=StaticCache(model.config, max_cache_len=20))
    assert torch.equal(model.generate(ids, past_key_values=cache, **how), model.generate(ids, **how))


def test_a_cache_that_was_reset_takes_another_number_format():
    model, cache, ids, mask = filled()
    cache.reset()
    model.to(torch.bfloat16)
    write(model, cache, ids, mask, [12])
    assert not cache.check()


def test_the_hooks_go_with_the_last_cache():
    model = model_of("llama")
    hooks = [module._forward_pre_hooks for module in (model, model.base_model)]
    cache = SketchCache(model)
    other = copy.copy(cache)
    del cache
    gc.collect()
    assert [len(h) for h in hooks] == [1, 1]
    del other
    gc.collect()
    assert [len(h) for h in hooks] == [0, 0]


class _Stream:
    """What offloading asks of a stream, for a machine without an accelerator."""

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_offloaded_storage(monkeypatch):
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _Stream())
    model, cache, ids, mask = filled(storage=lambda config: DynamicCache(config=config, offloading=True))
    assert cache.offloading
    shift(cache, 0, [5])
    assert cache.repair().ways == {"recompute": 1}
    assert not cache.check()


def test_a_static_storage_that_is_full_says_so_and_keeps_what_it_has():
    model = model_of("llama")
    ids = torch.arange(1, 9)[None]
    cache = SketchCache(model, storage=StaticCache(model.config, max_cache_len=8))
    for length in (9, 2**10):
        with pytest.raises(ValueError, match=f"has room for 8 tokens, and these make {length}"):
            model(torch.ones(1, length).long(), past_key_values=cache)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="has room for 8 tokens, and these make 9: .*max_cache_len"):
        model(ids[:, :1], past_key_values=cache)
    assert not cache.check()


def test_a_copy_of_the_model_is_a_model_like_any_other():
    model, cache, ids, mask = filled()
    plain = model(ids).logits
    twin, second = copy.deepcopy(model), copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, plain)
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in twin.modules())
    own = SketchCache(second)
    second(ids, past_key_values=own)
    assert sum(len(module._forward_pre_hooks) for module in second.modules()) == 2
    assert not own.check()
    del own, cache
    assert not any(module._forward_pre_hooks for m in (model, second) for module in m.modules())


def test_a_pass_that_failed_leaves_nothing_behind():
    model = model_of("llama")
    cache, ids = SketchCache(model), torch.tensor([[5, 6]])
    with pytest.raises(IndexError):
        model(torch.tensor([[5, VOCABULARY]]), past_key_values=cache)
    model(ids, past_key_values=cache)
    assert torch.equal(cache.record.ids, ids)
    assert PAD not in cache.record.ids
    assert not cache.check()
