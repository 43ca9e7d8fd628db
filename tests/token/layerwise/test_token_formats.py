"""Sound caches of unusual numbers are left alone by families D and E: large biases of keys, and bf16."""

import functools

import pytest
import torch
from sketch_caches import assert_sound, write
from small_models import VOCABULARY, model_of, padded_batch
from tiny_repair import base_of, calibrated, case

from cachemedic import CorruptionSpec, RepairOperator, corrupt_cache, protect
from cachemedic.defenses.defense import CachedTokens
from cachemedic.models.cache import stack_cache
from cachemedic.models.load import Base
from cachemedic.token.layerwise.augmented import AugmentedRead
from cachemedic.token.layerwise.calibration import calibrate, vectors_of
from cachemedic.token.layerwise.observation import KNOWN_TOLERANCE
from cachemedic.token.layerwise.scrub import Scrubber, positions_of
from cachemedic.token.layerwise.sketch_cache import SketchCache
from cachemedic.token.layerwise.token_vectors import join

LENGTH = 20
BIAS = 120.0  # of some numbers of a key, whose deviations are near 1.7


@functools.cache
def biased(family: str, dtype: torch.dtype = torch.float32):
    """A model with key biases far beyond the deviations of its keys, and a calibrated operator at work."""
    model = model_of("qwen2")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias[::3] = BIAS
        layer.self_attn.k_proj.bias[1::3] = -BIAS
    model = model.to(dtype)
    ids = torch.randint(1, VOCABULARY, (12, 48), generator=torch.Generator().manual_seed(0))
    operator = RepairOperator.create(
        family, model.config, range(3), **({"share": 0.2} if family == "layerwise-E" else {})
    )
    calibrate(operator, Base(model, None, "biased"), vectors_of(Base(model, None, "biased"), ids))
    operator.strength.data.fill_(1)
    return model, operator


def filled(model, operator):
    """A cache of a padded batch that was written within `protect`: most of it at once, then token by token."""
    ids, mask = padded_batch(length=LENGTH)
    cache = SketchCache(model, operator)
    with protect(model, operator):
        write(model, cache, ids, mask, [LENGTH - 4, *range(LENGTH - 3, LENGTH + 1)])
    return cache


def stored(cache) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(x.clone() for x in stack_cache(cache))


def error(cache, clean) -> float:
    """Mean squared error of what is stored, over the variance."""
    pairs = list(zip(stored(cache), clean, strict=True))
    return float(sum((x - y).float().square().mean() for x, y in pairs) / sum(y.float().var() for _, y in pairs))


def test_large_key_biases_are_no_damage():
    model, operator = biased("layerwise-E")
    transform = operator.transform
    assert (transform.mean * transform.scale).abs().max() > 50, "farther off than a deviation may be"
    cache = filled(model, operator)
    before = stored(cache)
    assert before[0].abs().max() > BIAS
    assert_sound(cache)
    torch.testing.assert_close(stored(cache), before, rtol=0, atol=0)


def test_without_a_code_large_key_biases_are_not_read_as_zero():
    model, operator = biased("layerwise-D")
    cache = filled(model, operator)
    before = stored(cache)
    cache.scrub()
    assert error(cache, before) < 1e-3, "keys that were read as zero are beyond repair"


def test_an_augmented_read_keeps_large_key_biases():
    model, operator = biased("layerwise-E")
    ids, mask = padded_batch(length=LENGTH)
    cache = filled(model, operator)
    k, v = stored(cache)
    scrubber = Scrubber(model, operator)
    codes = cache.record.codes(scrubber)
    repair = scrubber.repair(k, v, ids, positions_of(mask.bool()), codes)
    wide = AugmentedRead.of(operator, repair).cache(k, v)
    for index, layer in enumerate(wide.layers):
        torch.testing.assert_close(layer.keys[..., : k.shape[-1]], k[:, index], rtol=0, atol=0)
        torch.testing.assert_close(layer.values[..., : v.shape[-1]], v[:, index], rtol=0, atol=0)


def test_beside_large_key_biases_damage_is_healed():
    model, operator = biased("layerwise-E")
    cache = filled(model, operator)
    clean = stored(cache)
    bad = corrupt_cache(cache, CorruptionSpec("contiguous_overwrite", parameter=6), seed=1, donor=cache)
    bad.layers[2].keys[0, 1, LENGTH - 2, 3] = torch.nan
    bad.layers[1].values[1, 0, LENGTH - 2, 5] = 1e4
    bad.scrub()
    assert error(bad, clean) < 0.1
    assert stored(bad)[1].abs().max() < 2 * clean[1].abs().max()


@pytest.mark.parametrize("name", ["llama", "biased"])
def test_a_bf16_model_is_left_alone_and_healed(name):
    if name == "biased":
        model, operator = biased("layerwise-E", torch.bfloat16)
    else:
        model = model_of(name).bfloat16()
        base = Base(model, None, name)
        ids = torch.randint(1, VOCABULARY, (12, 48), generator=torch.Generator().manual_seed(0))
        operator = calibrate(
            RepairOperator.create("layerwise-E", model.config, range(3), share=0.5), base, vectors_of(base, ids)
        )
        operator.strength.data.fill_(1)
    cache = filled(model, operator)
    clean = stored(cache)
    assert clean[0].dtype == torch.bfloat16
    assert_sound(cache)
    torch.testing.assert_close(stored(cache), clean, rtol=0, atol=0)
    bad = corrupt_cache(cache, CorruptionSpec("gaussian", parameter=1.0, share=0.5), seed=1)
    before = error(bad, clean)
    bad.scrub()
    assert error(bad, clean) < 0.1 * before
    assert stored(bad)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_what_a_bf16_cache_rounds_of_an_fp32_model_is_no_damage(architecture):
    c = case(architecture)
    operator = calibrated(architecture, "layerwise-E", share=0.2)
    scrubber = Scrubber(base_of(architecture).model, operator)
    k, v = c.k.bfloat16(), c.v.bfloat16()
    codes = scrubber.write(CachedTokens.behind_padding(k, v, c.ids, c.valid))
    rounded = (join(k, v).float() - join(c.k, c.v))[:, 0] * operator.transform.scale[0]
    assert rounded.abs().max() > KNOWN_TOLERANCE, "more than may be off in fp32"
    new_k, new_v, _ = scrubber.scrub(k, v, c.ids, positions_of(c.valid), codes)
    assert torch.equal(new_k, k)
    assert torch.equal(new_v, v)
    hit = k.clone()
    hit[:, 0, 0, -3, 1] += 0.2 * k[:, 0].std()  # beyond rounding, and seen
    new_k, *_ = scrubber.scrub(hit, v, c.ids, positions_of(c.valid), codes)
    torch.testing.assert_close(new_k[:, 0], k[:, 0], rtol=2**-7, atol=0)
