"""Weights of sequences: the formula where it is finite, its limits, and what the options promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemedic.training.valence.weights import valence_weights

batches = st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=2, max_size=24)


def formula(s: torch.Tensor, lam: float) -> torch.Tensor:
    return torch.exp(lam * (s - s.mean()) / (s.std() + 1e-8))


@given(batches, st.floats(0, 8))
def test_without_options_it_is_the_formula(saliency, lam):
    s = torch.tensor(saliency, dtype=torch.float64)
    if s.std() > 1e-3:
        torch.testing.assert_close(valence_weights(s, lam), formula(s, lam), rtol=1e-6, atol=0)


def test_the_formula_of_small_differences_knows_its_floor():
    s = torch.tensor([0.0, 1e-8, 3e-8], dtype=torch.float64)  # as small as the 1e-8 beside the deviation
    torch.testing.assert_close(valence_weights(s, 6.0), formula(s, 6.0))


def test_batches_are_the_last_axis():
    s = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(0))
    together = valence_weights(s, 5.0, normalise=True)
    assert torch.equal(together[2, 1], valence_weights(s[2, 1], 5.0, normalise=True))


@pytest.mark.parametrize("s", [[0.3], [0.1] * 7, [1e-30] * 3, [-5e8] * 4])
@pytest.mark.parametrize("normalise", [False, True])
def test_one_or_equal_saliencies_weigh_one(s, normalise):
    assert valence_weights(torch.tensor(s), 8.0, normalise).tolist() == [1.0] * len(s)


@given(batches, st.floats(0, 1000), st.floats(1, 10))
def test_normalised_weights_have_mean_one_also_under_a_cap(saliency, lam, cap):
    s = torch.tensor(saliency, dtype=torch.float64)
    free, capped = valence_weights(s, lam, normalise=True), valence_weights(s, lam, normalise=True, max_weight=cap)
    for weights in (free, capped):
        assert float(weights.mean()) == pytest.approx(1)
        assert (weights[s.argsort()].diff() >= -1e-12).all()  # no order is reversed
    assert float(capped.max()) <= cap * (1 + 1e-9)
    below = capped < cap * (1 - 1e-9)
    ratio = capped[below] / free[below].clamp_min(1e-300)
    known = free[below] > 1e-250
    assert not known.any() or torch.allclose(ratio[known], ratio[known][0].expand(int(known.sum())))


@given(st.integers(2, 24), st.data(), st.floats(0, 40))
def test_a_cap_that_fits_exactly_leaves_the_mean_at_one(count, data, lam):
    carriers = data.draw(st.integers(1, count))  # as many sequences as the cap lets carry the whole weight
    saliency = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=count, max_size=count))
    for dtype in (torch.float32, torch.float64):
        weights = valence_weights(torch.tensor(saliency, dtype=dtype), lam, normalise=True, max_weight=count / carriers)
        assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
        assert float(weights.max()) <= count / carriers * (1 + 1e-5)


def test_a_cap_alone_cuts_off():
    s = torch.tensor([0.0, 0.1, 5.0])
    torch.testing.assert_close(valence_weights(s, 6.0, max_weight=2.0), formula(s, 6.0).clamp_max(2.0))


def test_extreme_saliencies_stay_finite():
    s = torch.tensor([-1e300, 0.0, 1e300], dtype=torch.float64)
    torch.testing.assert_close(valence_weights(s, 6.0), torch.tensor([-6.0, 0.0, 6.0], dtype=torch.float64).exp())


def test_a_weight_beyond_the_format_is_an_error_that_names_the_way_out():
    s = torch.tensor([1.0] + [0.0] * 299)
    with pytest.raises(ValueError, match=r"exp\(138.\d\) is beyond torch.float32: set normalise or max_weight"):
        valence_weights(s, 8.0)
    assert float(valence_weights(s, 8.0, normalise=True)[0]) == pytest.approx(300)
    assert float(valence_weights(s, 8.0, max_weight=9.0)[0]) == pytest.approx(9)


def test_only_a_learned_lambda_gets_a_gradient():
    s = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    assert not valence_weights(s, 6.0).requires_grad
    lam = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    valence_weights(s, lam)[2].backward()
    z = (s[2] - s.mean()) / (s.std() + 1e-8)
    assert float(lam.grad) == pytest.approx(float((z * torch.exp(2 * z)).detach()), rel=1e-5)
    assert s.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([]),), "at least one"),
        ((torch.tensor([1, 2]),), "floating-point"),
        ((torch.tensor([math.nan, 1.0]),), "finite"),
        ((torch.ones(2), -1.0), "lam must be a finite number from 0 upwards, not -1.0"),
        ((torch.ones(2), math.inf), "lam must be"),
        ((torch.ones(2), 1.0, True, 0.5), "at least 1 with normalise: 0.5"),
        ((torch.ones(2), 1.0, False, 0.0), "positive: 0.0"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        valence_weights(*arguments)
