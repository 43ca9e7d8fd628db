"""What families D and E cost: writing the sketch, a scrub, and the augmented read, on a model of random weights."""

from __future__ import annotations

import torch

from cachemedic.token_aware.operator import TokenAware, coordinates
from cachemedic.token_aware.scalar_codes import allot_bits
from cachemedic.token_aware.sketch_code import SketchCode
from cachemedic.token_aware.transform import Transform

CHAIN_RANK = 128


def random_transform(operator: TokenAware, seed: int = 0) -> Transform:
    """A transform of the shapes that calibration gives, of random numbers: as much work as a measured one."""
    numbers = torch.Generator().manual_seed(seed)
    layers, width = len(operator.layers), 2 * operator.config.model.num_kv_heads * operator.head_dim
    rank = min(width // 2, CHAIN_RANK)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers)

    return Transform(
        mean=0.1 * draw(layers, width),
        scale=draw(layers, width).mul_(0.1).exp_(),
        first=draw(layers, width),
        chain_in=draw(layers, 2 * width, rank) / (2 * width) ** 0.5,
        chain_out=0.5 * draw(layers, rank, width) / rank**0.5,
        basis=torch.linalg.qr(draw(width, width)).Q.expand(layers, -1, -1),
        variance=torch.linspace(1, 0.1, width).square().expand(layers, -1),
    )


def random_code(operator: TokenAware, transform: Transform) -> SketchCode:
    """A code of the operator's bytes for that transform."""
    variance = transform.variance[:, : coordinates(operator.config)].clone()
    variance[: operator.known_layers] = 0
    budget = int(operator.config.options["share"] * 16 * transform.width * transform.num_layers)
    return SketchCode(transform, allot_bits(variance, budget), variance.sqrt().clamp_min(1e-9))
