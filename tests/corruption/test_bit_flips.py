"""Flipped bits of stored words against struct, numpy and integer arithmetic, and how they are drawn."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.corruption.storage_faults import FORMATS, bernoulli_indices, flip_bits

L, G, D = 2, 2, 8
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-40, 6e-8, 65504.0, 65520.0, 3.4e38, 1.0, -1.0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGERS[x.element_size()])


def word(x: float, storage: str) -> int:
    """The stored word of one float32 number: struct and integer arithmetic only."""
    single = struct.unpack("<I", struct.pack("<f", x))[0]
    if storage == "fp32":
        return single
    if storage == "bf16":  # round to nearest, ties to even
        return (single + 0x7FFF + (single >> 16 & 1)) >> 16
    try:
        return struct.unpack("<H", struct.pack("<e", x))[0]
    except OverflowError:
        return 0xFC00 if x < 0 else 0x7C00


def field_of(storage: str, field: str) -> range:
    """The bits of a field, lowest first, by the formats' definitions."""
    width, exponent = {"fp32": (32, 8), "fp16": (16, 5), "bf16": (16, 8), "int8": (8, 0)}[storage]
    mantissa = width - 1 - exponent
    return {
        "all": range(width), "sign": range(width - 1, width), "exponent": range(mantissa, width - 1),
        "mantissa": range(mantissa),
    }[field]  # fmt: skip


def fields() -> list[tuple[str, str]]:
    return [(storage, field) for storage in FORMATS for field in FORMATS[storage].fields]


@settings(max_examples=40)
@given(st.data(), st.sampled_from([pair for pair in fields() if pair[0] != "int8"]))
def test_flipped_words_are_those_of_integer_arithmetic(data, pair):
    storage, field = pair
    numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False))
    values = data.draw(st.lists(numbers, min_size=1, max_size=8))
    positions = field_of(storage, field)
    flips = sorted(data.draw(st.sets(st.integers(0, len(values) * len(positions) - 1))))
    expected = [word(value, storage) for value in values]
    for flip in flips:
        expected[flip // len(positions)] ^= 1 << positions[flip % len(positions)]
    found = flip_bits(torch.tensor(values), storage, field, torch.tensor(flips, dtype=torch.int64))
    width = 8 * found.element_size()
    assert found.dtype == FORMATS[storage].dtype
    assert [int(w) & (2**width - 1) for w in bits(found)] == expected


@pytest.mark.parametrize("field", ["all", "sign", "mantissa"])
def test_int8_words_have_a_scale_per_vector_that_is_not_hit(field):
    x = torch.randn(5, 3, D, generator=seeded()) * torch.logspace(-6, 4, 3)[:, None]
    x[0, 0] = 0.0
    positions = field_of("int8", field)
    flips = bernoulli_indices(x.numel() * len(positions), 0.2, seeded(1))
    scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    words = np.where(scale > 0, np.round(x.numpy() / np.maximum(scale.numpy(), 1e-30)), 0).astype(np.int8)
    mask = np.zeros(x.numel(), np.uint8)
    for flip in flips.tolist():
        mask[flip // len(positions)] ^= 1 << positions[flip % len(positions)]
    expected = (words.view(np.uint8) ^ mask.reshape(x.shape)).view(np.int8).astype(np.float32) * scale.numpy()
    found = flip_bits(x, "int8", field, flips)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-30)
    assert (words == -128).sum() == 0, "the lowest word is reached by a flip only"


@pytest.mark.parametrize("storage", FORMATS)
def test_what_was_stored_once_is_stored_alike_again(storage):
    x = torch.randn(4000, 16, generator=seeded()) * torch.logspace(-6, 6, 4000)[:, None].clamp(max=1e4)
    nothing = torch.empty(0, dtype=torch.int64)
    once = flip_bits(x, storage, "all", nothing).float()
    assert torch.equal(bits(flip_bits(once, storage, "all", nothing).float()), bits(once))


def test_nan_infinity_and_negative_zero_come_out_of_flips():
    x = torch.tensor([1.0, 1.5, 0.0, 2.0])
    for storage in ("fp32", "bf16"):
        top = torch.tensor([7, 15])  # the one exponent bit that 1.0 and 1.5 lack
        inf, nan = flip_bits(x, storage, "exponent", top)[:2]
        assert inf == math.inf
        assert nan.isnan()
        payload = 1 << (22 if storage == "fp32" else 6)  # of 1.5, as stored
        ones = 0xFF << (23 if storage == "fp32" else 7)
        assert int(bits(nan[None])) == ones | payload
        zero = flip_bits(x, storage, "sign", torch.tensor([2]))[2]
        assert zero == 0
        assert zero.signbit()
    inverted = flip_bits(x, "bf16", "exponent", torch.arange(8))[0]
    assert inverted == 2.0, "the exponent of 1 is 0x7f, its inverse 0x80"


def test_trials_are_independent_and_of_probability_p():
    # all 8 patterns of 3 neighbouring trials, against the product of their probabilities
    n, p = 300_000, 0.3
    hit = torch.zeros(n)
    hit[bernoulli_indices(n, p, seeded())] = 1
    pattern = (hit.view(-1, 3) @ torch.tensor([1.0, 2.0, 4.0])).long()
    found = torch.bincount(pattern, minlength=8) / (n / 3)
    for i, share in enumerate(found.tolist()):
        expected = p ** i.bit_count() * (1 - p) ** (3 - i.bit_count())
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected / (n / 3)))


@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (7, 1e-3), (1000, 0.02), (10**6, 1e-6), (10**9, 1e-9), (50, 1e-30)])
def test_the_number_of_successes_is_binomial(n, p):
    generator, rounds = seeded(), 2000
    drawn = [bernoulli_indices(n, p, generator) for _ in range(rounds)]
    assert all((d.diff() > 0).all() and (d >= 0).all() and (d < n).all() for d in drawn)
    counts = torch.tensor([len(d) for d in drawn], dtype=torch.float64)
    mean, variance = n * p, n * p * (1 - p)
    assert counts.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / rounds))
    if mean >= 1:
        assert counts.var().item() == pytest.approx(variance, rel=0.2)
        middle = torch.cat(drawn).double().mean() / (n - 1)  # successes lie anywhere alike
        assert middle.item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * counts.sum().item()))


@pytest.mark.parametrize("pair", fields(), ids="-".join)
def test_every_bit_of_the_field_flips_alike_and_no_other(pair):
    storage, field = pair
    p, positions = 0.01, field_of(storage, field)
    name = f"bitflip_{storage}" + ("" if field == "all" else f"_{field}")
    k, v = (torch.randn(1, L, G, 5000, D, generator=seeded(s)) for s in (0, 1))
    if storage != "int8":
        k, v = (x.to(FORMATS[storage].dtype) for x in (k, v))
    event = draw_event(CorruptionSpec(name, parameter=p), (L, G, 5000), seeded())
    wide = corrupt(k.float(), v.float(), [event], seeded())
    for clean, found, same in zip((k, v), corrupt(k, v, [event], seeded()), wide, strict=True):
        torch.testing.assert_close(same, found.float(), rtol=0, atol=0, equal_nan=True)
        before, after = clean, found
        if storage == "int8":
            scale = (clean.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
            before, after = ((x / scale).round().to(torch.int8) for x in (clean, found))
        flipped = bits(before) ^ bits(after)
        for bit in range(8 * before.element_size()):
            share = (flipped >> bit & 1).float().mean().item()
            expected = p if bit in positions else 0.0
            assert share == pytest.approx(expected, abs=6 * math.sqrt(expected / flipped.numel()) + expected / 100)


@pytest.mark.parametrize(
    ("storage", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_a_cache_of_the_stored_type_loses_the_flipped_bits_only(storage, dtype):
    shape = (2, L, G, 40, D)
    k, v = (torch.randn(shape, generator=seeded(s)).to(dtype) for s in (0, 1))
    width = 8 * k.element_size()
    event = draw_event(CorruptionSpec(f"bitflip_{storage}", parameter=0.01), shape[1:4], seeded())
    k2, v2 = corrupt(k, v, [event] * 2, seeded())
    generator = seeded()
    for row in range(2):
        for clean, found in ((k, k2), (v, v2)):
            words = bits(clean[row]).numpy().reshape(-1).copy()
            for flip in bernoulli_indices(len(words) * width, 0.01, generator).tolist():
                words[flip // width] ^= np.array(1, words.dtype) << (flip % width)
            assert (bits(found[row]).numpy().reshape(-1) == words).all()
    assert not k2.isfinite().all(), "exponent flips make infinities and NaN, and they stay"
