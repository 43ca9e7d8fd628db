"""The canonical repair objective: distillation, identity on clean samples, contraction on corrupted ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cachemedic.core.divergence import contraction_loss, kd_per_token
from cachemedic.training.step_data import StepOutputs


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
