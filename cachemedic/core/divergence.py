"""How far a repaired cache and its logits are from the clean ones: the terms of the repair objective."""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F

from cachemedic.core.errors import check_given

EPS = 1e-8
Norms = tuple[torch.Tensor, torch.Tensor]  # of keys and of values


def kd_loss(z_clean: torch.Tensor, z_rep: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """KL(softmax(z_clean / T) || softmax(z_rep / T)) of logits [..., V], mean over the leading axes, no T^2 factor.

    Raises as `kd_per_token`.
    """
    return kd_per_token(z_clean, z_rep, temperature).mean()


def kd_per_token(z_clean: torch.Tensor, z_rep: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """The same for each token: logits [..., V] -> [...] in nats (Hinton et al. 2015, without their T^2).

    A token that the teacher rules out (a logit of -inf) adds nothing, the limit of p log p. Raises `ValueError` for
    logits of different shapes, and unless T is a positive number.
    """
    if not (isinstance(temperature, Real) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be a positive number, not {temperature!r}")
    for logits in (z_clean, z_rep):
        check_given("logits", logits, torch.Tensor)
    if z_clean.shape != z_rep.shape:
        raise ValueError(f"teacher and student logits differ in shape: {tuple(z_clean.shape)}, {tuple(z_rep.shape)}")
    teacher = F.log_softmax(z_clean / temperature, dim=-1)
    student = F.log_softmax(z_rep / temperature, dim=-1)
    impossible = teacher == -torch.inf
    if impossible.any():
        teacher, student = (x.masked_fill(impossible, 0.0) for x in (teacher, student))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _check_shapes(*caches: torch.Tensor) -> None:
    shapes = {tuple(x.shape) for x in caches}
    if len(shapes) != 1:
        raise ValueError(f"keys and values of one layer must be [B, G, T, d] alike, not {sorted(shapes)}")


def cache_norm(x: torch.Tensor) -> torch.Tensor:
    """Frobenius norms [...] of keys or values [..., G, T, d]."""
    return torch.linalg.vector_norm(x.flatten(-3), dim=-1)  # unlike a root of squares, its gradient at zero is zero


def relative_square(left: Norms, clean: Norms) -> torch.Tensor:
    """The identity loss from norms (of keys, of values): of the error that is left, and of what is clean."""
    return (left[0].square() + left[1].square()) / (clean[0].square() + clean[1].square() + EPS)


def error_ratio(left: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """rho from norms: of the error that is left, over that of the error that was found."""
    return left / (found + EPS)


def identity_loss(
    k_clean: torch.Tensor, v_clean: torch.Tensor, k_rep: torch.Tensor, v_rep: torch.Tensor
) -> torch.Tensor:
    """Normalised squared deviation of one layer's repaired from its clean cache, [B, G, T, d] each -> [B].

    (||K_rep - K||^2 + ||V_rep - V||^2) / (||K||^2 + ||V||^2 + 1e-8), Frobenius norms per sample.
    Raises `ValueError` for different shapes.
    """
    _check_shapes(k_clean, v_clean, k_rep, v_rep)
    left = cache_norm(k_rep - k_clean), cache_norm(v_rep - v_clean)
    return relative_square(left, (cache_norm(k_clean), cache_norm(v_clean)))


def contraction_ratio(
    k_clean: torch.Tensor,
    v_clean: torch.Tensor,
    k_corr: torch.Tensor,
    v_corr: torch.Tensor,
    k_rep: torch.Tensor,
    v_rep: torch.Tensor,
) -> torch.Tensor:
    """rho of one layer, [B, G, T, d] each -> [B]: the error norm that repair leaves over the one that it found.

    (||K_rep - K|| + ||V_rep - V||) / (||K_corr - K|| + ||V_corr - V|| + 1e-8); below 1 repair contracts. A sample whose
    corruption changed nothing has no ratio: mask it before averaging. Raises `ValueError` for different shapes.
    """
    _check_shapes(k_clean, v_clean, k_corr, v_corr, k_rep, v_rep)
    left = cache_norm(k_rep - k_clean) + cache_norm(v_rep - v_clean)
    return error_ratio(left, cache_norm(k_corr - k_clean) + cache_norm(v_corr - v_clean))


def contraction_loss(rho: torch.Tensor, alpha: float | torch.Tensor = 0.8) -> torch.Tensor:
    """Hinge max(0, rho - alpha)^2, elementwise."""
    return (rho - alpha).clamp_min(0).square()
