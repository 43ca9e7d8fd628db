"""Adam for stacks of runs: every run has its own step count, so that one can be set back without the others."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class RunAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) on parameters [R, ...], all state [R, ...] too; the steps of torch's, bit for bit."""

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for p in group["params"]:
                steps = torch.zeros(len(p), dtype=torch.float64)
                self.state[p] = {"step": steps, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                first, second = state["exp_avg"], state["exp_avg_sq"]
                first.lerp_(p.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                steps = state["step"].view(-1, *[1] * (p.ndim - 1))
                scale = (-group["lr"] / (1 - beta1**steps)).to(p)
                root = (1 - beta2**steps).sqrt().to(p)
                p.add_(scale * first / (second.sqrt() / root).add_(group["eps"]))
