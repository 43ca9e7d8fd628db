"""A valence head for the tiny bases, and trainers that use it."""

from dataclasses import replace

import torch
from tiny_training import CONFIG

from cachemedic.training.trainer import Trainer


def feeling(hidden: torch.Tensor) -> torch.Tensor:
    """A head of two dimensions for the tiny base, 32 wide."""
    mixing = torch.randn(hidden.shape[-1], 2, generator=torch.Generator().manual_seed(3)) / 5
    return torch.sigmoid(hidden @ mixing)


def trainer_of(base, bank, folder, *objectives, **options) -> Trainer:
    return Trainer(base, replace(CONFIG, objectives=objectives, **options), folder, bank, feeling)
