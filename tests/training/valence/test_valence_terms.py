"""The terms of the valence objective and the saliency, each against its definition."""

import itertools
import math

import pytest
import torch

from cachemedic.training.valence.saliency import saliency, saliency_parts
from cachemedic.training.valence.terms import (
    contrastive,
    cross_entropy,
    kd_feature,
    kd_sequence,
    kd_soft,
    valence_future,
    weight_decay,
)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_distillation_has_its_square_and_its_gradient():
    teacher, student = draws(3, 1, 7), draws(3, 1, 7, seed=1).requires_grad_()
    loss = kd_soft(teacher, student, temperature=6.0)
    p, q = (torch.softmax(z / 6.0, -1) for z in (teacher, student))
    torch.testing.assert_close(loss, 36 * (p * (p / q).log()).sum(-1)[:, 0])
    loss.sum().backward()
    torch.testing.assert_close(student.grad, 6.0 * (q - p))


def test_soft_distillation_is_the_mean_over_tokens():
    teacher, student = draws(2, 5, 7), draws(2, 5, 7, seed=1)
    each = torch.stack([kd_soft(teacher[:, i : i + 1], student[:, i : i + 1]) for i in range(5)])
    torch.testing.assert_close(kd_soft(teacher, student), each.mean(0))


def test_features_are_summed_over_layers():
    teacher, student = draws(2, 3, 4, 5), draws(2, 3, 4, 5, seed=1)
    expected = [
        sum(torch.nn.functional.mse_loss(s, t) for s, t in zip(*x, strict=True))
        for x in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(kd_feature(teacher, student), torch.stack(expected))
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 3, 4, 5\), \(2, 3, 4, 4\)"):
        kd_feature(teacher, student[..., :4])


def test_future_valence_and_cross_entropy():
    a, b = draws(2, 4, 2), draws(2, 4, 2, seed=1)
    torch.testing.assert_close(valence_future(a, b), ((a - b) ** 2).mean((1, 2)))
    logits, targets = draws(2, 3, 5), torch.tensor([[0, 1, 2], [4, 3, 2]])
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_weight_decay_is_one_number_a_run():
    decay = weight_decay([torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.ones(2, 1, 1)], runs=2)
    assert decay.tolist() == [6.0, 10.0]
    assert weight_decay([], runs=3).tolist() == [0.0] * 3


def test_the_contrastive_term_prefers_the_own_teacher():
    teacher = torch.eye(4)[None]
    right, wrong = contrastive(teacher, teacher), contrastive(teacher, teacher.roll(1, 1))
    torch.testing.assert_close(right, torch.full((1, 4), math.log(1 + 3 * math.exp(-10))))
    assert (wrong > 9).all()
    assert contrastive(teacher[:, :1], teacher[:, 1:2]).item() == 0


class Chain:
    """A student and a teacher over 3 tokens: the logits of a token depend on the one before."""

    def __init__(self) -> None:
        self.student = (draws(4, 3) * 1.5).requires_grad_()  # row 3: at the start
        self.teacher = draws(4, 3, seed=1) * 1.5

    def log_p(self, logits: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
        before = (3, *tokens[:-1])
        return torch.stack([logits[b].log_softmax(-1)[t] for b, t in zip(before, tokens, strict=True)])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_gradient_of_sequence_distillation_is_unbiased(batch):
    chain, steps = Chain(), 3
    sequences = list(itertools.product(range(3), repeat=steps))
    log_p = {y: chain.log_p(chain.student, y) for y in sequences}
    log_t = {y: chain.log_p(chain.teacher, y) for y in sequences}
    exact = sum(log_p[y].sum().exp() * -log_t[y].sum() for y in sequences)
    expected = torch.autograd.grad(exact, chain.student, retain_graph=True)[0]
    # every batch that can be drawn, by its probability: the expectation itself, no sampling error
    value, surrogate = 0.0, 0.0
    for drawn in itertools.product(sequences, repeat=batch):
        probability = torch.stack([log_p[y].sum() for y in drawn]).sum().exp().detach()
        term = kd_sequence(torch.stack([log_t[y] for y in drawn]), torch.stack([log_p[y] for y in drawn])).mean()
        value, surrogate = value + probability * term.detach(), surrogate + probability * term
    torch.testing.assert_close(value, exact.detach())
    torch.testing.assert_close(torch.autograd.grad(surrogate, chain.student)[0], expected)


def test_the_baseline_lowers_the_variance():
    chain = Chain()
    generator = torch.Generator().manual_seed(0)
    gradients = {2: [], 1: []}
    for _ in range(300):
        tokens = []
        for _ in range(2):
            first = int(torch.multinomial(chain.student[3].softmax(-1).detach(), 1, generator=generator))
            second = int(torch.multinomial(chain.student[first].softmax(-1).detach(), 1, generator=generator))
            tokens.append((first, second))
        for batch in (2, 1):  # a batch of one has no baseline
            parts = [tokens] if batch == 2 else [[t] for t in tokens]
            term = sum(
                kd_sequence(
                    torch.stack([chain.log_p(chain.teacher, y) for y in part]),
                    torch.stack([chain.log_p(chain.student, y) for y in part]),
                ).sum() for part in parts
            )  # fmt: skip
            gradients[batch].append(torch.autograd.grad(term, chain.student)[0])
    spread = {batch: torch.stack(g).var(0).sum() for batch, g in gradients.items()}
    assert spread[2] < spread[1]


def test_saliency_is_the_weighted_sum_of_its_parts():
    trajectory = torch.rand(2, 3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = draws(2, 3, 5, 11)
    parts = saliency_parts(trajectory, logits)
    v, signed = trajectory[..., 0], 2 * trajectory - 1
    torch.testing.assert_close(parts["mean"], v.mean(-1))
    torch.testing.assert_close(parts["minimum"], v.min(-1).values)
    p = logits.softmax(-1)
    torch.testing.assert_close(parts["certainty"], 1 + (p * p.log()).sum(-1).mean(-1) / math.log(11))
    cosines = (
        (signed[..., 1:, :] * signed[..., :-1, :]).sum(-1)
        / signed.norm(dim=-1)[..., 1:]
        / signed.norm(dim=-1)[..., :-1]
    )
    torch.testing.assert_close(parts["coherence"], cosines.mean(-1))
    expected = 0.55 * parts["mean"] + 0.2 * parts["minimum"] + 0.15 * parts["certainty"] + 0.1 * parts["coherence"]
    torch.testing.assert_close(saliency(trajectory, logits), expected)
    only = saliency(trajectory, logits, alpha=(0.0, 0.0, 1.0, 0.0))
    torch.testing.assert_close(only, parts["certainty"])


def test_certainty_is_one_for_one_token_and_zero_for_none_preferred():
    trajectory = torch.full((1, 2, 2), 0.7)
    certain, uncertain = torch.tensor([[[0.0, -1e4, -1e4]] * 2]), torch.zeros(1, 2, 3)
    assert saliency_parts(trajectory, certain)["certainty"].item() == 1
    assert saliency_parts(trajectory, uncertain)["certainty"].item() == pytest.approx(0, abs=1e-6)
    assert saliency_parts(trajectory, certain)["coherence"].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("trajectory", "logits", "message"),
    [((2, 1, 2), (2, 4, 9), "2 or more steps"), ((2, 3, 1), (2, 4, 9), "2 or more dim"), ((2, 3, 2), (4, 9), "belong")],
)
def test_shapes_that_mean_nothing_are_refused(trajectory, logits, message):
    with pytest.raises(ValueError, match=message):
        saliency(torch.rand(trajectory), torch.rand(logits))
    with pytest.raises(ValueError, match="alpha must be 4 finite numbers"):
        saliency(torch.rand(2, 3, 2), torch.rand(2, 3, 9), alpha=(1.0, 2.0))
