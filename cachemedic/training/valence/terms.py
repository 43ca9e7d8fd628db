"""The terms of valence-weighted distillation, each one number a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from cachemedic.core.divergence import kd_per_token

CONTRAST = 0.1  # temperature of the contrastive term


def kd_soft(z_teacher: torch.Tensor, z_student: torch.Tensor, temperature: float = 6.0) -> torch.Tensor:
    """T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)), logits [..., M, V] -> [...], mean over the M tokens.

    With its T^2 the gradient to a student logit is T (p_student - p_teacher) (Hinton et al. 2015).
    """
    return temperature**2 * kd_per_token(z_teacher, z_student, temperature).mean(-1)


def kd_feature(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Sum over layers of the mean squared difference of features [..., L, M, width] -> [...]."""
    if teacher.shape != student.shape:
        raise ValueError(f"teacher and student features differ in shape: {(*teacher.shape,)}, {(*student.shape,)}")
    return (student - teacher).square().mean((-2, -1)).sum(-1)


def kd_sequence(log_p_teacher: torch.Tensor, log_p_student: torch.Tensor) -> torch.Tensor:
    """- sum_t log p_teacher(y_t | y_<t, x) of sequences y that the student sampled: [..., B, n] each -> [..., B].

    The samples are no function of the parameters, so the gradient of the expected value is that of the score function
    (MiniLLM, Gu et al. 2023): each log p_student(y_t) is weighted by the cost from t on, less a baseline: the mean cost
    of the other B - 1 sequences from t on, which is independent of y and so leaves the gradient unbiased.
    """
    if log_p_teacher.shape != log_p_student.shape:
        raise ValueError(f"log-probabilities differ in shape: {(*log_p_teacher.shape,)}, {(*log_p_student.shape,)}")
    cost = -log_p_teacher.detach()
    ahead = cost.flip(-1).cumsum(-1).flip(-1)  # [..., B, n]
    others = log_p_teacher.shape[-2] - 1
    baseline = (ahead.sum(-2, keepdim=True) - ahead) / others if others else 0.0
    score = ((ahead - baseline) * log_p_student).sum(-1)
    return cost.sum(-1) + score - score.detach()  # the value of the cost, the gradient of the score


def valence_future(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of valence trajectories [..., k, m] over the next k steps -> [...]."""
    return (student - teacher).square().mean((-2, -1))


def cross_entropy(z_student: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """- log p_student(target), logits [..., M, V] and tokens [..., M] -> [...], mean over the M tokens."""
    return -F.log_softmax(z_student, -1).gather(-1, targets[..., None]).squeeze(-1).mean(-1)


def weight_decay(parameters: Sequence[torch.Tensor], runs: int) -> torch.Tensor:
    """Sum of squares of the parameters [R, ...] of each run -> [R]; zero without parameters."""
    if not parameters:
        return torch.zeros(runs)
    return torch.stack([p.flatten(1).square().sum(1) for p in parameters]).sum(0)


def contrastive(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """InfoNCE of features [..., B, width] -> [..., B]: each student by its own teacher and those of other sequences.

    Cosine similarities over a temperature of 0.1 (van den Oord et al. 2018); zero for a batch of one.
    """
    alike = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).mT / CONTRAST
    return -F.log_softmax(alike, -1).diagonal(dim1=-2, dim2=-1)
