"""The cache of families D and E: written with its sketch, carried through generation, scrubbed."""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from small_models import VOCABULARY, model_of, padded_batch
from transformers import DynamicCache, StaticCache

from cachemedic import CorruptionSpec, RepairOperator, SketchCache, calibrate, corrupt_cache, protect
from cachemedic.cache import stack_cache
from cachemedic.models import Base
from cachemedic.token_aware.calibration import vectors_of
from cachemedic.token_aware.operator import DEAD_ZONE
from cachemedic.token_aware.scalar_codes import pack
from cachemedic.token_aware.scrub import Scrubber

MODELS = ["gpt2", "llama", "gpt_neox", "phi", "qwen3", "opt", "mistral"]
SAMPLING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
}
NEW = 7  # generated tokens


@functools.cache
def protected(name: str, family: str = "E", dtype: torch.dtype = torch.float32, **options):
    """A model and an operator for it, calibrated on random ids and as strong as it can be without training."""
    model = model_of(name).to(dtype)
    ids = torch.randint(1, VOCABULARY, (24, 60), generator=torch.Generator().manual_seed(0))
    base = Base(model, None, name)
    own = {"share": 0.5} if family == "E" else {}
    operator = RepairOperator.create(family, model.config, layers=range(3), **(own | options))
    operator = calibrate(operator, base, vectors_of(base, ids))
    with torch.no_grad():
        operator.strength.fill_(1)
    return model, operator


def write(model, cache, ids, mask, ends):
    """Forward passes up to each of `ends`; the logits of the last."""
    start = int(cache.get_seq_length())
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for end in ends:
        logits = model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache
        ).logits
        start = end
    return logits


def filled(name, length=12, scrub="load", storage=None, family="E", **options):
    """Model, operator, a cache of a padded batch, and the batch."""
    model, operator = protected(name, family, **options)
    ids, mask = padded_batch(length=length)
    cache = SketchCache(model, operator, scrub, storage)
    with protect(model, operator):
        write(model, cache, ids, mask, [length])
    return model, operator, cache, ids, mask


def assert_sound(cache):
    """A scrub finds no damage and changes nothing."""
    report = cache.scrub()
    assert report.tokens > 0
    assert sum(report.changed) == 0
    assert report.suspicion.max() <= DEAD_ZONE


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
    codes = Scrubber(model, operator).write(k, v, ids, mask.bool())  # of the whole cache at once
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


@pytest.mark.parametrize("family", ["D", "E"])
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


CHANGES = {
    "crop": (lambda cache: cache.crop(-4), [0, 1, 2], 8),
    "crop to one": (lambda cache: cache.crop(-11), [0, 1, 2], 1),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0], 12),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1], 12),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2], 12),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "phi"])
def test_the_sketch_follows_its_tokens(name, change):
    act, rows, length = CHANGES[change]
    model, operator, cache, ids, mask = filled(name)
    act(cache)
    assert len(cache.record) == length
    generator = torch.Generator().manual_seed(2)
    new = torch.randint(1, VOCABULARY, (len(rows), 3), generator=generator)
    ids, mask = torch.cat([ids[rows, :length], new], 1), torch.cat([mask[rows, :length], torch.ones_like(new)], 1)
    whole = SketchCache(model, operator)
    with protect(model, operator):
        logits = write(model, cache, ids, mask, range(length + 1, length + 4))
        torch.testing.assert_close(
            logits[:, -1], write(model, whole, ids, mask, [length + 3])[:, -1], atol=1e-3, rtol=1e-3
        )
    assert_sound(cache)
    assert torch.equal(cache.record.ids, ids)
    assert (cache.record.sketch != whole.record.sketch).double().mean() < 0.01


def test_a_cache_that_was_reset_is_written_anew():
    model, operator, cache, ids, mask = filled("gpt2")
    sketch = cache.record.sketch
    cache.reset()
    assert cache.get_seq_length() == cache.sketch_bytes() == 0
    with protect(model, operator):
        write(model, cache, ids, mask, [12])
    assert torch.equal(cache.record.sketch, sketch)


@pytest.mark.parametrize("family", ["D", "E"])
def test_the_policy_says_when_to_scrub(family):
    def scrubs(scrub, change=lambda cache: None):
        model, operator, cache, ids, mask = filled("llama", length=4, scrub=scrub, family=family)
        change(cache)
        reports = []
        ids, mask = padded_batch(length=10)
        with protect(model, operator):
            for end in range(5, 11):
                write(model, cache, ids, mask, [end])
                if cache.report is not None and (not reports or cache.report is not reports[-1][1]):
                    reports.append((end, cache.report))
        return [end for end, _ in reports]

    assert scrubs("load") == []
    assert scrubs("load", SketchCache.mark_loaded) == [5]
    assert scrubs("every") == [5, 6, 7, 8, 9, 10]
    assert scrubs(2) == [6, 8, 10]
    assert scrubs(4, SketchCache.mark_loaded) == [5, 9]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_are_of_their_own_and_count_as_loaded(copied):
    model, operator, cache, ids, mask = filled("llama")
    other = copied(cache)
    assert other.operator is operator
    longer, longer_mask = padded_batch(length=14)
    longer[:, :12] = ids
    with protect(model, operator):
        write(model, other, longer, longer_mask, [14])
    assert other.report is not None
    assert (len(cache.record), cache.get_seq_length(), cache.report) == (12, 12, None)
    assert_sound(cache)
    assert_sound(other)


def test_half_precision_caches_have_no_false_alarms_of_the_code():
    model, operator, cache, ids, mask = filled("llama", dtype=torch.bfloat16)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    k, v = stack_cache(cache)
    report = cache.scrub()
    assert report.suspicion.max() <= DEAD_ZONE
    cache.layers[1].keys.mul_(-1)
    assert cache.scrub().changed[1] == report.tokens
    new_k, _ = stack_cache(cache)
    assert (new_k - k).float().norm() < 0.2 * k.float().norm()
    assert new_k.dtype == torch.bfloat16


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
    model, operator = protected("llama")
    ids, mask = padded_batch()
    call = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    cache = SketchCache(model, operator, "every", DynamicCache(config=model.config, offloading=True))
    with protect(model, operator):
        assert torch.equal(
            model.generate(ids, past_key_values=cache, **call), model.generate(ids, use_cache=False, **call)
        )
    assert cache.offloading
    assert_sound(cache)


def test_embeddings_do_for_an_operator_that_needs_no_ids():
    model, operator = protected("llama", known_layers=0)
    ids, _ = padded_batch(rows=1)
    cache = SketchCache(model, operator)
    with protect(model, operator):
        logits = model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits)
    assert_sound(cache)
    model, operator = protected("llama")
    with protect(model, operator), pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=SketchCache(model, operator))


@contextmanager
def refused(message):
    with pytest.raises(ValueError, match=message):
        yield


def test_what_cannot_be_protected_is_refused():
    model, operator = protected("llama")
    ids, mask = padded_batch()
    with refused("within `protect"):
        model(ids, past_key_values=SketchCache(model, operator))
    for family in "DE":
        model, other = protected("llama", family)
        with protect(model, other):
            assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)
            with refused(
                f"family {family} .* SketchCache stores.* got a DynamicCache: pass past_key_values=SketchCache"
            ):
                model.generate(ids, attention_mask=mask, max_new_tokens=2)
    with protect(model, operator), refused("one of another operator"):
        model(ids, past_key_values=SketchCache(model, protected("llama", "D")[1]))
    with protect(model, operator):
        with refused("pass position_ids"):
            model(ids, attention_mask=mask, past_key_values=SketchCache(model, operator))
        with refused(r"attention mask \[3, 9\], not a mask \[3, 1, 9, 9\]"):
            model(
                ids,
                attention_mask=mask[:, None, None].expand(-1, 1, 9, -1),
                past_key_values=SketchCache(model, operator),
            )
        cache = SketchCache(model, operator)
        model(ids, past_key_values=cache)
        super(SketchCache, cache).update(*(torch.zeros(3, 2, 1, 8) for _ in "kv"), 0)
        with refused("holds 10 tokens, 9 of them written"):
            model(ids[:, :1], past_key_values=cache)
    for scrub, message in (("evry", "did you mean 'every'"), (0, "not 0")):
        with refused(message):
            SketchCache(model, operator, scrub)
    with refused("not 2"):
        SketchCache(model, RepairOperator.create("E", model.config, layers=[0], runs=2))
    with refused("knows no clean tokens yet"):
        SketchCache(model, RepairOperator.create("E", model.config, layers=[0]))
    with refused("9 tokens already"):
        SketchCache(model, operator, cache=model(ids).past_key_values)
    mistral, of_mistral = protected("mistral")
    with refused("not in a DynamicSlidingWindowLayer"):
        SketchCache(mistral, of_mistral, cache=DynamicCache(config=mistral.config))
    with refused("nothing to scrub"):
        SketchCache(model, operator).scrub()
