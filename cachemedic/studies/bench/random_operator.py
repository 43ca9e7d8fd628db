"""Operators of D and E for a model of random weights, whose joint model is of random numbers: as much work."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from cachemedic.models.shape import ModelShape
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.coder import joint_operator
from cachemedic.token.joint import RECENT, JointModel
from cachemedic.token.joint_calibration import COORDINATES, LARGEST_PART
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.prior_fit import PRIOR_RANK


def random_operator(model: PreTrainedModel, family: str) -> JointOperator:
    """An operator for all layers; its joint model has the sizes that calibration on long text gives."""
    operator = joint_operator(RepairOperator.create(family, model.config, layers="all"))
    of, numbers = ModelShape.of(model.config), torch.Generator().manual_seed(0)
    width = 2 * of.num_kv_heads * of.head_dim
    dim = width * of.num_layers
    count = min(COORDINATES, dim // LARGEST_PART)
    rank = min(PRIOR_RANK, RECENT * width)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=numbers) / columns**0.5).bfloat16()

    variance = torch.linspace(1, 0.1, count).square()
    operator.set_joint(
        JointModel(
            of=of,
            layers=tuple(range(of.num_layers)),
            mean=torch.zeros(dim),
            scale=torch.ones(dim),
            axes=draw(count, dim),
            variance=variance,
            rest=torch.full((dim,), 0.01),
            lowest_mean=torch.zeros(width),
            lowest_scale=torch.ones(width),
            prior_in=draw(RECENT * width, rank),
            prior_out=draw(rank, dim),
            prior_variance=torch.ones(rank),
        )
    )
    return operator
