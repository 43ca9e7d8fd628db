"""Rounding to few levels: it is told from other damage, and what it says of numbers is used."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_operators import operator_of
from scipy.stats import truncnorm
from small_models import VOCABULARY, model_of
from transformers import DynamicCache

from cachemedic.models.cache import stack_cache
from cachemedic.token.parts import Parts
from cachemedic.token.rounded import half_steps, within

PARTS, ROWS, LENGTH = Parts(layers=2, heads=3, width=32), 2, 50


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, LENGTH, PARTS.count * PARTS.width, generator=generator)


def rounded(x, bits, hit=None):
    """x, in parts of tokens [B, T, P] that are hit, in steps of which the largest number of a part is a multiple."""
    by_part = PARTS.split(x)
    hit = torch.ones(by_part.shape[:-1], dtype=torch.bool) if hit is None else hit
    largest = (by_part.abs() * hit[..., None]).amax((1, 3), keepdim=True)
    step = largest / (2 ** (bits - 1) - 1)
    return torch.where(hit[..., None], (by_part / step).round() * step, by_part).flatten(-2), step[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_step_of_what_was_rounded_is_found(bits, dtype):
    generator = torch.Generator().manual_seed(1)
    hit = torch.rand(ROWS, LENGTH, 1, generator=generator) < 0.6
    hit = hit & (torch.rand(ROWS, 1, PARTS.count, generator=generator) < 0.6)
    bad, step = rounded(drawn(), bits, hit)
    found = half_steps(bad.to(dtype), PARTS)
    assert torch.equal(found > 0, hit)
    assert torch.allclose(found, torch.where(hit, step / 2, 0.0), rtol=0.01)
    sound = torch.rand(hit.shape, generator=generator) < 0.5
    assert torch.equal(half_steps(bad.to(dtype), PARTS, sound) > 0, hit & ~sound)


def test_other_numbers_were_not_rounded():
    clean = drawn()
    uniform = torch.rand(clean.shape, generator=torch.Generator().manual_seed(2))
    damaged = {
        "nothing": clean,
        "zeros": clean * (uniform > 0.5),
        "nearly all zeros": clean * (uniform > 0.97),
        "one number a token": clean * (uniform > 0.985),
        "all zeros": torch.zeros_like(clean),
        "signs": clean.sign(),
        "not finite": torch.full_like(clean, torch.nan),
        "eight bits": rounded(clean, 8)[0],
    }
    for name, bad in damaged.items():
        assert half_steps(bad, PARTS) is None, name


@given(st.floats(-30, 30), st.floats(0.01, 30), st.floats(0.1, 5))
def test_bounded_normal_numbers_are_those_of_scipy(middle, half, size):
    low, high = (middle - half) / size, (middle + half) / size
    if min(abs(low), abs(high)) > 12 and low * high > 0:
        return  # the reference is not exact so far out
    mean, variance = (float(x[0]) for x in within(*(torch.tensor([x]) for x in (middle, half, size**2))))
    expected = truncnorm(low, high, scale=size)
    assert math.isclose(mean, expected.mean(), abs_tol=2e-3 * size + 1e-3 * half)
    assert middle - half - 1e-4 * size <= mean + 1e-5 * abs(middle) + 1e-4
    assert mean - 1e-5 * abs(middle) - 1e-4 <= middle + half + 1e-4 * size
    assert variance <= min(size**2, half**2 / 3) * 1.001
    assert math.isclose(variance, expected.var(), rel_tol=0.1, abs_tol=0.02 * size**2)


@pytest.mark.parametrize("share", [None, 0.1])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_rounded_cache_is_estimated_within_its_bounds(arch, share):
    model, operator = model_of(arch), operator_of(arch, share)
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(40).expand(2, -1)
    with torch.inference_mode():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        clean = stack_cache(cache)
        kept = operator.write_tokens(model, *clean, ids, positions)
        step = [x.abs().amax((3, 4), keepdim=True) / 1.49 for x in clean]  # minus one, zero and one of it
        bad = [(x / s).round() * s for x, s in zip(clean, step, strict=True)]
        found = operator.repair(model, *bad, ids, positions, kept)
        known = operator.repair(model, *bad, ids, positions, kept, "restore")
    for written, read, estimated, restored, size in zip(clean, bad, found, known, step, strict=True):
        assert ((estimated - read)[:, 1:, :, 4:].abs() <= 0.5001 * size[:, 1:] + 1e-5).all()
        errors = [(x - written)[:, 1:, :, 4:].square().mean() for x in (estimated, read, restored)]
        assert errors[0] < min(errors[1:])
