"""The best parameters of every run by validation, those before any training included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

EVERY = 10  # steps between validations


class KeepBest:
    """Remembers the parameters of each of R runs at their lowest validation loss."""

    def __init__(self, trained: nn.Module, runs: int) -> None:
        self.trained = trained
        self.loss = torch.full((runs,), torch.inf)
        self.parameters = {name: p.detach().clone() for name, p in trained.named_parameters()}

    def update(self, loss: Tensor) -> None:
        """Takes the present parameters of the runs whose loss [R] is lower than ever."""
        better = loss.cpu() < self.loss
        for name, p in self.trained.named_parameters():
            self.parameters[name][better] = p.detach()[better]
        self.loss = torch.where(better, loss.cpu(), self.loss)

    @torch.no_grad()
    def restore(self) -> None:
        """Gives every run its best parameters."""
        for name, p in self.trained.named_parameters():
            p.copy_(self.parameters[name])

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "parameters": self.parameters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss = state["loss"]
        for name, p in state["parameters"].items():
            self.parameters[name] = p.to(self.parameters[name].device)
