"""The cache of families D and E: its sketch follows the tokens; policies, copies, storage, refusals."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from sketch_caches import NEW, assert_sound, filled, protected, write
from small_models import VOCABULARY, padded_batch
from transformers import DynamicCache

from cachemedic import RepairOperator, protect
from cachemedic.models.cache import stack_cache
from cachemedic.token.layerwise.operator import DEAD_ZONE
from cachemedic.token.layerwise.sketch_cache import SketchCache

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


@pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])
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


def test_a_cache_is_not_pickled():
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(filled("llama")[2])


def test_a_pass_that_failed_leaves_nothing_to_a_pass_outside():
    model, operator = protected("llama")
    cache, ids = SketchCache(model, operator), torch.tensor([[5, 6]])
    with protect(model, operator), pytest.raises(IndexError):
        model(torch.tensor([[5, VOCABULARY]]), past_key_values=cache)
    with refused("within `protect"):
        model(ids, past_key_values=copy.copy(cache))
    with refused("within `protect"):
        model(ids, past_key_values=cache)
    with protect(model, operator):
        model(ids, past_key_values=cache)
    assert torch.equal(cache.record.ids, ids)


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
    for family in ("layerwise-D", "layerwise-E"):
        model, other = protected("llama", family)
        with protect(model, other):
            assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)
            with refused(
                f"family {family} .* SketchCache stores.* got a DynamicCache: pass past_key_values=SketchCache"
            ):
                model.generate(ids, attention_mask=mask, max_new_tokens=2)
    with protect(model, operator), refused("one of another operator"):
        model(ids, past_key_values=SketchCache(model, protected("llama", "layerwise-D")[1]))
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
        SketchCache(model, RepairOperator.create("layerwise-E", model.config, layers=[0], runs=2))
    with refused("knows no clean tokens yet"):
        SketchCache(model, RepairOperator.create("layerwise-E", model.config, layers=[0]))
    with refused("9 tokens already"):
        SketchCache(model, operator, cache=model(ids).past_key_values)
    mistral, of_mistral = protected("mistral")
    with refused("not in a DynamicSlidingWindowLayer"):
        SketchCache(mistral, of_mistral, cache=DynamicCache(config=mistral.config))
    with refused("nothing to scrub"):
        SketchCache(model, operator).scrub()
