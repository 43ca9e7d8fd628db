"""The canonical objective against plain loops over samples, layers and tokens."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemedic.core.divergence import contraction_loss, contraction_ratio, identity_loss, kd_loss, kd_per_token
from cachemedic.training.objective import RepairObjective, masked_mean
from cachemedic.training.step_data import StepOutputs


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_kd(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> float:
    """KL of two vectors of logits, number by number."""
    p, q = ([math.exp(x / temperature) for x in z.tolist()] for z in (teacher, student))
    p, q = ([x / sum(z) for x in z] for z in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def naive_norm(x: torch.Tensor) -> float:
    return math.sqrt(sum(number**2 for number in x.flatten().tolist()))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_kd_is_the_mean_of_the_naive_divergence(temperature):
    teacher, student = random(3, 2, 7), random(3, 2, 7, seed=1)
    naive = [[naive_kd(teacher[b, m], student[b, m], temperature) for m in range(2)] for b in range(3)]
    torch.testing.assert_close(kd_per_token(teacher, student, temperature), torch.tensor(naive, dtype=torch.float64))
    assert kd_loss(teacher, student, temperature).item() == pytest.approx(sum(map(sum, naive)) / 6)


@pytest.mark.parametrize("temperature", [0, -2.0, math.nan, math.inf, None, "2", [2.0]])
def test_what_is_no_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number, not"):
        kd_loss(torch.ones(2, 3), torch.ones(2, 3), temperature)
    with pytest.raises(TypeError, match="logits must be a Tensor, not a list"):
        kd_loss([1.0, 2.0], torch.ones(2))


def test_kd_carries_no_squared_temperature():
    """With the factor the loss would keep its scale; without it, it falls as 1 / T^2 (Hinton et al. 2015)."""
    teacher, student = random(4, 7), random(4, 7, seed=1)
    ratio = kd_loss(teacher, student, 50.0) / kd_loss(teacher, student, 100.0)
    assert ratio.item() == pytest.approx(4, rel=0.05)


@settings(max_examples=30)
@given(st.integers(0, 99), st.floats(0.3, 20), st.floats(-1e3, 1e3))
def test_kd_is_a_divergence(seed, temperature, shift):
    teacher, student = random(5, 6, seed=seed), random(5, 6, seed=seed + 100)
    assert (kd_per_token(teacher, student, temperature) > 0).all()
    same = kd_per_token(teacher, teacher + shift, temperature)  # logits say the same up to a constant
    torch.testing.assert_close(same, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_gradient_of_kd_is_the_difference_of_the_distributions():
    teacher, student = random(6), random(6, seed=1).requires_grad_()
    kd_loss(teacher, student, 2.0).backward()
    torch.testing.assert_close(student.grad, ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).detach() / 2)


def test_kd_refuses_logits_of_different_shapes():
    with pytest.raises(ValueError, match=r"\(2, 5\), \(2, 6\)"):
        kd_loss(random(2, 5), random(2, 6))


def test_identity_loss_and_contraction_ratio_are_the_naive_ones():
    k, v, k_corr, v_corr, k_rep, v_rep = (random(3, 2, 4, 5, seed=i) for i in range(6))
    identity, rho = identity_loss(k, v, k_rep, v_rep), contraction_ratio(k, v, k_corr, v_corr, k_rep, v_rep)
    for b in range(3):
        off = naive_norm(k_rep[b] - k[b]) ** 2 + naive_norm(v_rep[b] - v[b]) ** 2
        assert identity[b].item() == pytest.approx(off / (naive_norm(k[b]) ** 2 + naive_norm(v[b]) ** 2 + 1e-8))
        left = naive_norm(k_rep[b] - k[b]) + naive_norm(v_rep[b] - v[b])
        found = naive_norm(k_corr[b] - k[b]) + naive_norm(v_corr[b] - v[b])
        assert rho[b].item() == pytest.approx(left / (found + 1e-8))


@settings(max_examples=30)
@given(st.integers(0, 99), st.floats(0, 3))
def test_a_repair_that_leaves_a_share_of_the_error_has_that_ratio(seed, share):
    k, v, k_off, v_off = (random(2, 2, 4, 5, seed=seed + i) for i in range(4))
    rho = contraction_ratio(k, v, k + k_off, v + v_off, k + share * k_off, v + share * v_off)
    torch.testing.assert_close(rho, torch.full((2,), share, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_perfect_repair_is_finite():
    k, v, k_off, v_off = (random(2, 2, 4, 5, seed=i) for i in range(4))
    k_rep, v_rep = k.clone().requires_grad_(), v.clone().requires_grad_()
    (contraction_ratio(k, v, k + k_off, v + v_off, k_rep, v_rep) + identity_loss(k, v, k_rep, v_rep)).sum().backward()
    assert k_rep.grad.isfinite().all()
    assert v_rep.grad.isfinite().all()


def test_the_hinge():
    rho = torch.tensor([0.0, 0.8, 0.9, 1.8])
    torch.testing.assert_close(contraction_loss(rho), torch.tensor([0.0, 0.0, 0.01, 1.0]))
    torch.testing.assert_close(contraction_loss(rho, 0.0), rho.square())


def step_outputs(runs: int = 3, samples: int = 5, layers: int = 2) -> StepOutputs:
    """Run 0 sees clean and corrupted samples, run 1 only clean ones, run 2 one that its corruption left alone."""
    is_clean = torch.tensor([[True, False, False, False, True], [True] * 5, [False] * 5])
    is_corrupted = ~is_clean[..., None].repeat(1, 1, layers)
    is_corrupted[0, 1, 0] = False  # a layer that the corruption missed
    is_corrupted[2, 3] = False  # a sample that it missed altogether
    return StepOutputs(
        z_clean=random(runs, samples, 2, 7),
        z_rep=random(runs, samples, 2, 7, seed=1),
        identity=random(runs, samples, layers, seed=2).square(),
        rho=2 * random(runs, samples, layers, seed=3).abs(),
        is_clean=is_clean,
        is_corrupted=is_corrupted,
        parameters=[random(runs, 4, seed=4), random(runs, 2, 3, seed=5)],
    )


def test_every_term_of_every_run_is_the_naive_one():
    step = step_outputs()
    weights = {"lambda_id": (1.0, 0.5, 2.0), "lambda_contr": (0.5, 1.0, 0.1), "alpha_contr": (0.8, 0.0, 0.3)}
    parts = RepairObjective(temperature=3.0, **weights, lambda_w=(0.0, 0.1, 0.2))(step)
    for run in range(3):
        kd = [naive_kd(step.z_clean[run, b, m], step.z_rep[run, b, m], 3.0) for b in range(5) for m in range(2)]
        identity = [step.identity[run, b].sum().item() for b in range(5) if step.is_clean[run, b]]
        hinges = [
            sum(
                max(0.0, step.rho[run, b, layer].item() - weights["alpha_contr"][run]) ** 2
                for layer in range(2)
                if step.is_corrupted[run, b, layer]
            )
            for b in range(5)
            if step.is_corrupted[run, b].any()
        ]
        size = sum(p[run].square().sum().item() for p in step.parameters)
        naive = {
            "kd": sum(kd) / 10,
            "identity": sum(identity) / max(len(identity), 1),
            "contraction": sum(hinges) / max(len(hinges), 1),
        }
        naive["loss"] = (
            naive["kd"]
            + weights["lambda_id"][run] * naive["identity"]
            + weights["lambda_contr"][run] * naive["contraction"]
            + (0.0, 0.1, 0.2)[run] * size
        )
        for name, value in naive.items():
            assert parts[name][run].item() == pytest.approx(value), name


def test_one_weight_holds_for_all_runs():
    step = step_outputs()
    one, each = RepairObjective(lambda_contr=0.1)(step), RepairObjective(lambda_contr=(0.1, 0.1, 0.1))(step)
    assert torch.equal(one["loss"], each["loss"])


def test_runs_do_not_see_each_other():
    step = step_outputs()
    other = replace(step, z_rep=step.z_rep.index_fill(0, torch.tensor(1), 0))
    parts, changed = RepairObjective()(step), RepairObjective()(other)
    assert parts["loss"][1] != changed["loss"][1]
    assert torch.equal(parts["loss"][[0, 2]], changed["loss"][[0, 2]])


@pytest.mark.parametrize("wild", [1e12, math.inf, math.nan])
def test_what_the_corruption_left_alone_counts_in_no_regulariser(wild):
    """Its ratio is a number over nothing, whatever comes out; neither value nor gradient may depend on it."""
    step = step_outputs()
    expected = RepairObjective()(step)
    rho = torch.where(step.is_corrupted, step.rho, wild).requires_grad_()
    parts = RepairObjective()(replace(step, rho=rho))
    for name, value in expected.items():
        assert torch.equal(parts[name], value), name
    parts["loss"].sum().backward()
    assert (rho.grad[~step.is_corrupted] == 0).all()
    assert rho.grad.isfinite().all()


def test_a_run_without_samples_of_a_kind_has_no_such_term():
    step = step_outputs()
    parts = RepairObjective()(step)
    assert parts["contraction"][1] == 0
    assert parts["identity"][2] == 0


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=8))
def test_masked_mean(row):
    values, mask = (torch.tensor([x]) for x in zip(*row, strict=True))
    kept = [value for value, counts in row if counts]
    assert masked_mean(values, mask).item() == pytest.approx(sum(kept) / len(kept) if kept else 0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"lambda_id": -1.0}, "lambda_id must be a number from 0 upwards, or a tuple of them, not -1.0"),
        ({"lambda_contr": (0.5, math.nan)}, "lambda_contr"),
        ({"lambda_w": ((0.1, 0.2),)}, "lambda_w"),
        ({"alpha_contr": "0.8"}, "alpha_contr"),
    ],
)
def test_bad_weights_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RepairObjective(**options)


def test_weights_of_another_number_of_runs_are_refused():
    with pytest.raises(ValueError, match="lambda_id holds 2 numbers for 3 runs"):
        RepairObjective(lambda_id=(1.0, 2.0))(step_outputs())


def test_a_token_that_is_ruled_out_adds_nothing_to_the_divergence():
    teacher, student = random(3, 2, 7), random(3, 2, 7, seed=1)
    expected = kd_loss(teacher[..., 1:], student[..., 1:])
    teacher[..., 0] = student[..., 0] = -torch.inf
    student.requires_grad_()
    loss = kd_loss(teacher, student)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert student.grad.isfinite().all()
    ruled_out_by_the_teacher_alone = torch.cat([random(3, 2, 1), student.detach()[..., 1:]], -1)
    assert kd_loss(teacher, ruled_out_by_the_teacher_alone).isfinite()
    assert kd_loss(torch.cat([random(3, 2, 1), teacher[..., 1:]], -1), student).isposinf()


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_temperatures_that_are_no_positive_number_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        kd_loss(random(2, 7), random(2, 7), temperature)


def test_losses_of_caches_that_do_not_belong_together_are_refused():
    one, two = random(1, 2, 5, 4), random(2, 2, 5, 4)
    with pytest.raises(ValueError, match=r"alike, not \[\(1, 2, 5, 4\), \(2, 2, 5, 4\)\]"):
        identity_loss(two, two, one, one)
    with pytest.raises(ValueError, match="alike"):
        contraction_ratio(two, two, one, one, two, two)
