"""A clamp to [0, 1] that can be trained away from its bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class InwardClamp(torch.autograd.Function):
    """clamp(x, 0, 1) whose gradient passes at a bound, and beyond it, wherever a descent step would lead inward.

    The plain clamp has no gradient beyond a bound, and a unit that has stepped over it would never come back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        inward = ((x < 1) | (gradient > 0)) & ((x > 0) | (gradient < 0))
        return gradient * inward
