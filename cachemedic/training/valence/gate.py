"""The mercy gate: updates that lower the student's projected future valence too far are taken back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cachemedic.core.errors import nearest_valid

log = logging.getLogger(__name__)
PROJECTIONS = ("rollout", "proxy")
PROXY = 0.95  # the proxy takes this share of the batch's present valence for its future one


class MercyGateError(RuntimeError):
    """A run of blocked updates: training does not go on like this."""


@dataclass(frozen=True)
class MercyGate:
    """After an update the projected valence of the student must be at least `threshold` times the teacher's.

    projection: "rollout", the mean valence over the next `horizon` simulated steps (10 to 30) from `probe` sequences,
    on every `every`-th update (default 25); or "proxy", 0.95 times the mean valence of the batch, on every one.
    greedy: rollouts take the likeliest token; else they sample. patience: as many checks of one run blocked in a row
    are an error.
    """

    projection: str = "rollout"
    threshold: float = 0.90
    every: int | None = None
    horizon: int = 20
    probe: int = 8
    greedy: bool = True
    patience: int = 10

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise nearest_valid("projection of the mercy gate", self.projection, PROJECTIONS)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, not {self.threshold}")
        if not 10 <= self.horizon <= 30:
            raise ValueError(f"horizon must be 10 to 30 steps, not {self.horizon}")
        for name in ("every", "probe", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def due(self, update: int) -> bool:
        """Whether update number `update` (from 1) is checked."""
        every = self.every or (25 if self.projection == "rollout" else 1)
        return update % every == 0


@dataclass
class Verdict:
    """One check of R runs: what was projected, what the teacher has, and which updates were taken back; [R] each."""

    projected: torch.Tensor
    baseline: torch.Tensor
    blocked: torch.Tensor
    message: list[str | None]  # of blocked runs


class GateKeeper:
    """Applies a gate to the updates of an optimiser over R runs; counts what it blocked, in total and in a row [R].

    A run that fails a check goes back to its last state that passed one, or to its state when the keeper was made:
    between the checks of a gate that is not asked at every update there are states that no check has seen.
    """

    def __init__(self, gate: MercyGate, runs: int, optimizer: torch.optim.Optimizer) -> None:
        self.gate, self.runs, self.optimizer = gate, runs, optimizer
        self.blocked, self.in_a_row = torch.zeros(2, runs, dtype=torch.long)
        self.passed = Snapshot(optimizer)

    def step(self, project: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Verdict:
        """One update; the runs that fail the check are then bit for bit what passed last, optimiser state included.

        `project()` is called after the tentative update: the projected valence of the student and the baseline of the
        teacher, [R] each. Raises `MercyGateError` after `patience` blocked checks of a run in a row.
        """
        self.optimizer.step()
        projected, baseline = (x.detach().cpu().expand(self.runs) for x in project())
        # not "<": a valence that is not a number does not pass
        blocked = ~(projected >= self.gate.threshold * baseline)
        self.passed.restore(blocked)
        self.passed.take(~blocked)
        self.blocked += blocked
        self.in_a_row = torch.where(blocked, self.in_a_row + 1, 0)
        messages: list[str | None] = [None] * self.runs
        for run in blocked.nonzero().flatten().tolist():
            messages[run] = (
                f"Mercy gate blocked: projected valence {float(projected[run]):.4f} is below {self.gate.threshold:g} "
                f"times the teacher's {float(baseline[run]):.4f}"
            )
            log.warning("run %d: %s", run, messages[run])
        stuck = (self.in_a_row >= self.gate.patience).nonzero().flatten().tolist()
        if stuck:
            raise MercyGateError(
                f"{self.gate.patience} updates in a row were blocked in runs {stuck}; the last one of run {stuck[0]}: "
                f"{messages[stuck[0]]}. Lower the threshold or the learning rate"
            )
        return Verdict(projected, baseline, blocked, messages)

    def state_dict(self) -> dict[str, Any]:
        return {"blocked": self.blocked, "in_a_row": self.in_a_row, "passed": self.passed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.blocked, self.in_a_row = state["blocked"], state["in_a_row"]
        self.passed.load_state_dict(state["passed"])


class Snapshot:
    """Parameters and state of an optimiser at one time, or at one time for each run."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._take_all()

    def _take_all(self) -> None:
        self.values = [p.detach().clone() for p in self.parameters]
        self.states = [copy.deepcopy(self.optimizer.state.get(p)) for p in self.parameters]

    @torch.no_grad()
    def take(self, runs: torch.Tensor) -> None:
        """Have the runs where `runs` [R] holds as they are now. Raises as `restore`."""
        if runs.all():
            self._take_all()
        elif runs.any():
            for p, value, state in zip(self.parameters, self.values, self.states, strict=True):
                value[runs.to(p.device)] = p[runs.to(p.device)]
                self._copy(self.optimizer.state[p], state, runs)

    @torch.no_grad()
    def restore(self, runs: torch.Tensor) -> None:
        """Set the runs where `runs` [R] holds back to it.

        Raises `ValueError` if only some are meant and the optimiser's state is not [R, ...] like the parameters.
        """
        if not runs.any():
            return
        for p, value, state in zip(self.parameters, self.values, self.states, strict=True):
            if runs.all():
                p.copy_(value)
                self.optimizer.state.pop(p, None)
                if state is not None:
                    self.optimizer.state[p] = copy.deepcopy(state)
                continue
            p[runs.to(p.device)] = value[runs.to(p.device)]
            self._copy(state, self.optimizer.state[p], runs)

    def _copy(self, source: dict[str, Any] | None, target: dict[str, Any] | None, runs: torch.Tensor) -> None:
        """Copy the optimiser's state of some runs."""
        for name, numbers in (target or source or {}).items():
            if source is None or target is None or numbers.shape[:1] != runs.shape:
                raise ValueError(f"state {name!r} of {type(self.optimizer).__name__} is not one a run: use RunAdam")
            target[name][runs.to(numbers.device)] = source[name][runs.to(numbers.device)]

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ValueError` for the state of other parameters."""
        values, states = state["values"], state["states"]
        if [v.shape for v in values] != [v.shape for v in self.values]:
            raise ValueError("this is the state of other parameters")
        self.values = [value.to(p.device) for p, value in zip(self.parameters, values, strict=True)]
        self.states = [
            None if found is None else {name: x.to((own or found)[name].device) for name, x in found.items()}
            for own, found in zip(self.states, states, strict=True)
        ]
