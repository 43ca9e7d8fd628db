"""The canonical repair objective: distillation, identity on clean samples, contraction on corrupted ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from cachemedic.training.valence.step import ValenceStep

EPS = 1e-8


def kd_loss(z_clean: torch.Tensor, z_rep: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """KL(softmax(z_clean / T) || softmax(z_rep / T)) of logits [..., V], mean over the leading axes, no T^2 factor."""
    return kd_per_token(z_clean, z_rep, temperature).mean()


def kd_per_token(z_clean: torch.Tensor, z_rep: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """The same for each token: logits [..., V] -> [...] in nats (Hinton et al. 2015, without their T^2)."""
    if z_clean.shape != z_rep.shape:
        raise ValueError(f"teacher and student logits differ in shape: {tuple(z_clean.shape)}, {tuple(z_rep.shape)}")
    teacher = F.log_softmax(z_clean / temperature, dim=-1)
    student = F.log_softmax(z_rep / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)  # unlike a root of squares, its gradient at zero is zero


def identity_loss(
    k_clean: torch.Tensor, v_clean: torch.Tensor, k_rep: torch.Tensor, v_rep: torch.Tensor
) -> torch.Tensor:
    """Normalised squared deviation of one layer's repaired from its clean cache, [B, G, T, d] each -> [B].

    (||K_rep - K||^2 + ||V_rep - V||^2) / (||K||^2 + ||V||^2 + 1e-8), Frobenius norms per sample.
    """
    deviation = _norm(k_rep - k_clean).square() + _norm(v_rep - v_clean).square()
    return deviation / (_norm(k_clean).square() + _norm(v_clean).square() + EPS)


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
    corruption changed nothing has no ratio: mask it before averaging.
    """
    left = _norm(k_rep - k_clean) + _norm(v_rep - v_clean)
    found = _norm(k_corr - k_clean) + _norm(v_corr - v_clean)
    return left / (found + EPS)


def contraction_loss(rho: torch.Tensor, alpha: float | torch.Tensor = 0.8) -> torch.Tensor:
    """Hinge max(0, rho - alpha)^2, elementwise."""
    return (rho - alpha).clamp_min(0).square()


@dataclass
class StepOutputs:
    """What an objective sees of one training step: R runs, B samples each, M decoded tokens, P protected layers."""

    z_clean: torch.Tensor  # [R, B, M, V] teacher logits
    z_rep: torch.Tensor  # [R, B, M, V] student logits
    identity: torch.Tensor  # [R, B, P] identity loss of each layer, meaningful where `is_clean`
    rho: torch.Tensor  # [R, B, P] contraction ratio of each layer, meaningful where `is_corrupted`
    is_clean: torch.Tensor  # [R, B] bool: severity 0 or type none
    is_corrupted: torch.Tensor  # [R, B, P] bool: the corruption changed something in that layer
    parameters: list[torch.Tensor] = field(default_factory=list)  # phi, [R, ...] each
    rho_by_side: dict[str, torch.Tensor] = field(default_factory=dict)  # rho_k and rho_v, for the log; NaN where sound
    valence: ValenceStep | None = None  # where an objective of the sweep asks for it

    def select(self, runs: list[int]) -> StepOutputs:
        """That of some runs."""
        tensors = {name: x[runs] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return StepOutputs(
            **tensors,
            parameters=[p[runs] for p in self.parameters],
            rho_by_side={name: x[runs] for name, x in self.rho_by_side.items()},
            valence=None if self.valence is None else self.valence.select(runs),
        )


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of [R, B] over the samples of each run where `mask` holds; 0 for a run without any -> [R]."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp_min(1)


@dataclass(frozen=True)
class RepairObjective:
    """L = L_KD + lambda_id L_id + lambda_contr L_contr + lambda_w ||phi||^2, one value a run.

    Each weight is a number or one number a run (a tuple of R), so that a sweep trains in one loop.
    """

    temperature: float = 2.0
    lambda_id: float | tuple[float, ...] = 1.0
    lambda_contr: float | tuple[float, ...] = 0.5
    alpha_contr: float | tuple[float, ...] = 0.8
    lambda_w: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        for name in ("lambda_id", "lambda_contr", "alpha_contr", "lambda_w"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(number, float | int) and number >= 0 for number in numbers):
                raise ValueError(f"{name} must be a number from 0 upwards, or a tuple of them, not {value!r}")

    def __call__(self, step: StepOutputs) -> dict[str, torch.Tensor]:
        """`loss` and its parts `kd`, `identity`, `contraction`, each [R]."""

        def per_run(name: str) -> torch.Tensor:  # [R] or a single number
            weight = torch.as_tensor(getattr(self, name), dtype=step.z_rep.dtype, device=step.z_rep.device)
            if weight.numel() not in (1, len(step.z_rep)):
                raise ValueError(f"{name} holds {weight.numel()} numbers for {len(step.z_rep)} runs; give one or all")
            return weight

        kd = kd_per_token(step.z_clean, step.z_rep, self.temperature).mean(dim=(1, 2))
        identity = masked_mean(step.identity.sum(-1), step.is_clean)
        # a layer that the corruption did not touch has no ratio; a sample counts if any of its layers has one
        rho = torch.where(step.is_corrupted, step.rho, 0.0)
        hinge = contraction_loss(rho, per_run("alpha_contr").view(-1, 1, 1))
        contraction = masked_mean(hinge.sum(-1), step.is_corrupted.any(-1))
        loss = kd + per_run("lambda_id") * identity + per_run("lambda_contr") * contraction
        if step.parameters:
            size = torch.stack([p.flatten(1).square().sum(1) for p in step.parameters]).sum(0)
            loss = loss + per_run("lambda_w") * size
        return {"loss": loss, "kd": kd, "identity": identity, "contraction": contraction}
