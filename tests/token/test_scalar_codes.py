"""Few-bit codes against published values, brute force and value-by-value references."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from cachemedic.token.scalar_codes import (
    MAX_BITS,
    allot_bits,
    decode,
    distortion,
    encode,
    lloyd_max,
    pack,
    unpack,
)

# J. Max, Quantizing for minimum distortion (1960), table I: mean squared error and positive levels
PUBLISHED = {1: (0.3634, [0.7980]), 2: (0.1175, [0.4528, 1.510]), 3: (0.03454, [0.2451, 0.7560, 1.344, 2.152])}
PUBLISHED_ERRORS = {bits: error for bits, (error, _) in PUBLISHED.items()} | {4: 0.009497, 5: 0.002499}
BITS = st.lists(st.integers(0, MAX_BITS), min_size=1, max_size=12)


def slow_error(levels, thresholds) -> float:
    """The mean squared error of a quantiser of a standard normal variable, by a sum over a fine grid."""
    x = np.linspace(-9, 9, 200_001)
    return float(((x - np.array(levels)[np.searchsorted(thresholds, x)]) ** 2 * norm.pdf(x)).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("bits", PUBLISHED_ERRORS)
def test_quantisers_are_those_of_max(bits):
    levels, thresholds, error = lloyd_max(bits)
    assert error == pytest.approx(PUBLISHED_ERRORS[bits], rel=3e-3)
    assert error == pytest.approx(slow_error(levels, thresholds), rel=1e-4)
    np.testing.assert_allclose(levels, -np.array(levels)[::-1], atol=1e-9)
    if bits in PUBLISHED:
        np.testing.assert_allclose(levels[2 ** (bits - 1) :], PUBLISHED[bits][1], atol=6e-4)


@pytest.mark.parametrize("bits", [1, 3, MAX_BITS])
def test_no_nearby_quantiser_has_a_smaller_error(bits):
    levels, thresholds, error = lloyd_max(bits)
    rng = np.random.default_rng(bits)
    for _ in range(5):
        moved = np.sort(np.array(levels) + 0.03 * rng.standard_normal(2**bits) / 2**bits)
        assert slow_error(moved, (moved[1:] + moved[:-1]) / 2) > error * (1 - 1e-4)
        assert slow_error(levels, np.array(thresholds) + 0.01 * rng.standard_normal(2**bits - 1)) > error


def test_no_bit_leaves_the_variance_and_each_bit_gains_less():
    errors = [distortion(bits) for bits in range(MAX_BITS + 1)]
    assert errors[0] == pytest.approx(1.0)
    gains = -np.diff(errors)
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all(), "the greedy allotment is the best one for gains that fall"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=4), st.integers(0, 6))
def test_the_allotment_is_the_best_of_all(variances, budget):
    bits = allot_bits(torch.tensor(variances, dtype=torch.float64), budget)

    def left(allotted) -> float:
        return sum(v * distortion(b) for v, b in zip(variances, allotted, strict=True))

    every = itertools.product(range(budget + 1), repeat=len(variances))
    best = min(left(allotted) for allotted in every if sum(allotted) <= budget)
    assert left(bits.tolist()) == pytest.approx(best, abs=1e-12)
    assert int(bits.sum()) <= budget
    assert all(b == 0 for b, v in zip(bits.tolist(), variances, strict=True) if v == 0)


def test_an_allotment_keeps_its_shape_and_a_debt_is_an_error():
    bits = allot_bits(torch.tensor([[4.0, 1.0], [0.0, 0.25]]), 3)
    assert bits.tolist() == [[2, 1], [0, 0]]
    assert int(allot_bits(torch.ones(3), 10**6).sum()) == 3 * MAX_BITS
    with pytest.raises(ValueError, match="-1 bits is out of range"):
        allot_bits(torch.ones(3), -1)


@given(BITS, st.integers(0, 2**20))
def test_coding_takes_the_nearest_level_and_codes_it_as_itself(bits, seed):
    y = 1.5 * torch.randn(7, len(bits), generator=torch.Generator().manual_seed(seed))
    widths = torch.tensor(bits)
    codes = encode(y, widths)
    decoded = decode(codes, widths)
    assert codes.dtype == torch.uint8
    for row, column in itertools.product(range(len(y)), range(len(bits))):
        levels = [0.0] if bits[column] == 0 else lloyd_max(bits[column])[0]
        value = float(y[row, column])
        distances = np.abs(np.array(levels) - value)
        assert distances[codes[row, column]] == pytest.approx(distances.min(), abs=1e-5)
        assert float(decoded[row, column]) == pytest.approx(levels[codes[row, column]], abs=1e-6)
    assert torch.equal(encode(decoded, widths), codes)


@given(st.floats(-100, 100), st.integers(1, MAX_BITS))
def test_every_number_has_a_code_of_its_bits(value, bits):
    assert int(encode(torch.tensor([[value]]), torch.tensor([bits]))) < 2**bits


@given(BITS, st.integers(0, 2**20))
def test_packed_codes_come_back_and_take_no_more_bytes_than_they_must(bits, seed):
    widths = torch.tensor(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randint(0, 256, (2, 5, len(bits)), generator=generator) % 2**widths).to(torch.uint8)
    packed = pack(codes, widths)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 5, -(-sum(bits) // 8))
    assert torch.equal(unpack(packed, widths), codes)
    stream = "".join(f"{int(code):0{b}b}"[::-1] for code, b in zip(codes[1, 3], bits, strict=True) if b)
    slow = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    assert packed[1, 3].tolist() == slow


def test_coordinates_without_bits_cost_nothing_and_say_nothing():
    widths = torch.tensor([0, 0])
    codes = encode(torch.tensor([[-3.0, 1e30]]), widths)
    assert codes.tolist() == [[0, 0]]
    assert decode(codes, widths).tolist() == [[0.0, 0.0]]
    assert pack(codes, widths).shape == (1, 0)
    assert torch.equal(unpack(pack(codes, widths), widths), codes)
