"""The plain data of one training step, as objectives see it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class ValenceStep:
    """R runs, B samples, M decoded tokens, n sampled ones, L layers, m valence dimensions."""

    hidden_clean: torch.Tensor  # [R, B, L, M, width] after each layer, of the teacher
    hidden_rep: torch.Tensor  # of the student
    attention_clean: torch.Tensor  # the same, what each attention module adds
    attention_rep: torch.Tensor
    future_clean: torch.Tensor  # [R, B, M, m] valence of the teacher over the next M steps
    future_rep: torch.Tensor
    targets: torch.Tensor  # [R, B, M - 1] the tokens that follow the first M - 1 decoded ones
    order: torch.Tensor  # [R, B] a random permutation of the samples, for controls
    sampled_clean: torch.Tensor | None = None  # [R, B, n] log-probability of the student's samples to the teacher
    sampled_rep: torch.Tensor | None = None  # and to the student itself
    strength: torch.Tensor | None = None  # [R] lambda, if it is learned
    steps: list[torch.Tensor] | None = None  # the quantiser's parameters, [R, ...] each

    def select(self, runs: list[int]) -> ValenceStep:
        """The data of the given runs."""
        tensors = {name: x[runs] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return ValenceStep(**tensors, steps=None if self.steps is None else [p[runs] for p in self.steps])


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
        """The data of the given runs."""
        tensors = {name: x[runs] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return StepOutputs(
            **tensors,
            parameters=[p[runs] for p in self.parameters],
            rho_by_side={name: x[runs] for name, x in self.rho_by_side.items()},
            valence=None if self.valence is None else self.valence.select(runs),
        )
