"""Operators of families D and E with statistics drawn at random, for tests that need no calibrated ones."""

import torch

from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.bench.scrub import random_code, random_transform
from cachemedic.token.layerwise.operator import TokenAware


def informed(model, family: str = "layerwise-E", rank: int = 8, strength: float = 1.0, **options) -> TokenAware:
    """An operator for all layers of a model, at work."""
    layers = range(model.config.num_hidden_layers)
    operator = RepairOperator.create(family, model.config, layers=layers, rank=rank, **options)
    transform = random_transform(operator, seed=0)
    operator.hold(transform, random_code(operator, transform) if family == "layerwise-E" else None)
    with torch.no_grad():
        operator.strength.fill_(strength)
    return operator
