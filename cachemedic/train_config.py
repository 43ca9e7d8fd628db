"""What defines a sweep of trained operators: the configuration, the key of its results, and its stacked objective."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cachemedic.bank import BankConfig, weights_digest
from cachemedic.corruption import Mixture
from cachemedic.models import Base
from cachemedic.objective import RepairObjective


@dataclass(frozen=True)
class TrainConfig:
    """One sweep. `objectives` are the conditions; each is trained under every seed."""

    family: str = "A"
    layers: tuple[int, ...] = tuple(range(12))
    rank: int = 8
    apply_to: str = "KV"
    corrupted_layers: str = "all"  # "all": faults hit storage; "protected": faults on the protected layers only
    objectives: tuple[RepairObjective, ...] = (RepairObjective(),)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    mixture: Mixture = field(default_factory=Mixture)
    bank: BankConfig = BankConfig()
    steps: int = 300
    batch: int = 16  # samples per run and step
    lr: float = 3e-3
    clip: float = 1.0  # gradient norm per run
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if self.corrupted_layers not in ("all", "protected"):
            raise ValueError(f"corrupted_layers must be 'all' or 'protected', not {self.corrupted_layers!r}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must be distinct and at least one, not {self.seeds}")
        if not self.objectives:
            raise ValueError("objectives must hold at least one condition")
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.bank.samples < self.batch * len(self.seeds):
            raise ValueError(
                f"a bank of {self.bank.samples} samples is too small for {len(self.seeds)} seeds with batches of "
                f"{self.batch}: different seeds share no sample"
            )

    @property
    def runs(self) -> int:
        return len(self.seeds) * len(self.objectives)

    def key(self, base: Base) -> str:
        """The name of the trained operators: a hash of this configuration and of the base."""
        text = json.dumps([asdict(self), base.name, weights_digest(base)], sort_keys=True, default=str)
        return f"{Path(base.name).name}-{self.family}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def stack_objectives(objectives: tuple[RepairObjective, ...], seeds: int) -> RepairObjective:
    """One objective whose weights are one number a run, runs seed-major."""
    temperatures = {o.temperature for o in objectives}
    if len(temperatures) != 1:
        raise ValueError(f"all conditions of one sweep must share the temperature, not have {sorted(temperatures)}")
    weights = {
        name: tuple(getattr(o, name) for o in objectives) * seeds
        for name in ("lambda_id", "lambda_contr", "alpha_contr", "lambda_w")
    }
    return RepairObjective(temperature=objectives[0].temperature, **weights)
