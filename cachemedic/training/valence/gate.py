"""The mercy gate: updates that lower the student's projected future valence too far are taken back."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from cachemedic.core.errors import nearest_valid

log = logging.getLogger(__name__)
EVERY = {"rollout": 5, "proxy": 1}  # updates between checks, by projection
PROJECTIONS = tuple(EVERY)
LEAST_PROBE = 16  # sequences
MESSAGE = "Mercy gate blocked – low projected valence trajectory"
Projection = tuple[torch.Tensor, torch.Tensor]  # of the students and of their teacher, [R] each
PROXY = 0.95  # the proxy takes this share of the batch's present valence for its future one


class MercyGateError(RuntimeError):
    """A run of blocked updates: training does not go on like this."""


class SmallProbeWarning(UserWarning):
    """The probe batch of a mercy gate is smaller than its projection needs."""


@dataclass(frozen=True)
class MercyGate:
    """After an update the projected valence of the student must be at least `threshold` times the teacher's.

    projection: "rollout", the mean valence over the next `horizon` simulated steps (10 to 30) from `probe` sequences,
    on every `every`-th update (default 5); or "proxy", 0.95 times the mean valence of the batch, on every one.
    threshold: above 0 and at most 1, or 0 to block nothing and only watch. greedy: rollouts take the likeliest token;
    else they sample. patience: as many checks of one run blocked in a row are an error. both: the other projection is
    measured and logged, too, at those checks at which it would be due; it blocks nothing.
    Warns where `probe` is below 16: so few sequences are no trajectory to judge by.
    """

    projection: str = "rollout"
    threshold: float = 0.90
    every: int | None = None
    horizon: int = 20
    probe: int = LEAST_PROBE
    greedy: bool = True
    patience: int = 10
    both: bool = False

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise nearest_valid("projection of the mercy gate", self.projection, PROJECTIONS)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be 0 to 1, not {self.threshold}")
        if not 10 <= self.horizon <= 30:
            raise ValueError(f"horizon must be 10 to 30 steps, not {self.horizon}")
        for name in ("every", "probe", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.probe < LEAST_PROBE:
            warnings.warn(SmallProbeWarning(f"a probe of {self.probe} is below {LEAST_PROBE} sequences"), stacklevel=3)

    def due(self, update: int) -> bool:
        """Whether update number `update` (from 1) is checked."""
        return update % (self.every or EVERY[self.projection]) == 0

    @property
    def simulates(self) -> bool:
        """Whether there are rollouts, and so a probe batch."""
        return self.projection == "rollout" or self.both

    @property
    def other(self) -> MercyGate | None:
        """What else is measured, if anything."""
        name = next(name for name in PROJECTIONS if name != self.projection)
        return replace(self, projection=name, every=None, both=False) if self.both else None


@dataclass
class Verdict:
    """One check of R runs: what was projected, what the teacher has, and which updates were taken back; [R] each."""

    projected: torch.Tensor
    baseline: torch.Tensor
    blocked: torch.Tensor
    message: list[str | None]  # of blocked runs
    other: Projection | None = None  # by the projection that does not judge


class GateKeeper:
    """Applies a gate to the updates of an optimiser over R runs; counts what it blocked, in total and in a row [R].

    A run that fails a check goes back to its last state that passed one, or to its state when the keeper was made:
    between the checks of a gate that is not asked at every update there are states that no check has seen.
    """

    def __init__(self, gate: MercyGate, runs: int, optimizer: torch.optim.Optimizer) -> None:
        self.gate, self.runs, self.optimizer = gate, runs, optimizer
        self.blocked, self.in_a_row = torch.zeros(2, runs, dtype=torch.long)
        self.has_passed = torch.zeros(runs, dtype=torch.bool)
        self.passed = Snapshot(optimizer)

    def start(self, measure: Callable[[MercyGate], Projection]) -> None:
        """Judge the state before any update, to which runs may have to go back. Nothing is blocked or counted."""
        self.has_passed = ~self._fails(*measure(self.gate))

    def step(self, update: int, measure: Callable[[MercyGate], Projection]) -> Verdict:
        """Update number `update`; runs that fail are then bit for bit what passed last, optimiser state included.

        `measure` is called after the tentative update: by a gate, the projected valence of the students and the
        baseline of the teacher, [R] each. Raises `MercyGateError` after `patience` blocked checks of a run in a row.
        """
        self.optimizer.step()
        projected, baseline = (x.detach().cpu().expand(self.runs) for x in measure(self.gate))
        other = self.gate.other
        beside = measure(other) if other is not None and other.due(update) else None
        blocked = self._fails(projected, baseline)
        self.passed.restore(blocked)
        self.passed.take(~blocked)
        self.has_passed |= ~blocked
        self.blocked += blocked
        self.in_a_row = torch.where(blocked, self.in_a_row + 1, 0)
        messages: list[str | None] = [None] * self.runs
        for run in blocked.nonzero().flatten().tolist():
            found, needed = float(projected[run]), self.gate.threshold * float(baseline[run])
            messages[run] = (
                f"{MESSAGE}: {found:.4f} is projected, {needed:.4f} needed ({self.gate.threshold:g} of the teacher's)"
            )
            log.warning("run %d: %s", run, messages[run])
        stuck = (self.in_a_row >= self.gate.patience).nonzero().flatten().tolist()
        if stuck:
            raise MercyGateError(
                f"{self.gate.patience} checks in a row were blocked in runs {stuck}; the last one of run {stuck[0]}: "
                f"{messages[stuck[0]]}. Lower the threshold or the learning rate"
            )
        return Verdict(projected, baseline, blocked, messages, beside)

    def _fails(self, projected: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
        # not "<": a valence that is not a number does not pass
        return ~(projected >= self.gate.threshold * baseline).cpu().expand(self.runs)

    def end(self) -> None:
        """Raises `MercyGateError` if there are runs of which no state has passed."""
        never = (~self.has_passed).nonzero().flatten().tolist()
        if never:
            raise MercyGateError(
                f"no state of runs {never} passed the mercy gate, not even the one before training: their faults lower "
                "the valence below the threshold, and training did not raise it. Lower the threshold"
            )

    def state_dict(self) -> dict[str, Any]:
        counts = {"blocked": self.blocked, "in_a_row": self.in_a_row, "has_passed": self.has_passed}
        return {**counts, "passed": self.passed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.blocked, self.in_a_row, self.has_passed = (state[k] for k in ("blocked", "in_a_row", "has_passed"))
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
