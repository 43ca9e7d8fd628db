"""What defines a sweep of trained operators: the configuration, the key of its results, and its stacked objective."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cachemedic.core.integers import whole_number, whole_numbers
from cachemedic.corruption.apply import Mixture
from cachemedic.corruption.severity import shipped_map
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.repair.registry import family_class
from cachemedic.training.bank import BankConfig, weights_digest
from cachemedic.training.objective import RepairObjective
from cachemedic.training.step_data import StepOutputs
from cachemedic.training.valence.gate import MercyGate
from cachemedic.training.valence.head import head_digest
from cachemedic.training.valence.objective import ValenceObjective
from cachemedic.training.valence.quantiser import QuantiserConfig

Objective = RepairObjective | ValenceObjective
MOST_STEPS = 10_000_000  # weeks of the smallest base


@dataclass(frozen=True)
class TrainConfig:
    """One sweep. `objectives` are the conditions, of either kind; each is trained under every seed.

    With a quantiser the cache is stored in few bits, whose steps are trained with the operator or alone; with a gate
    updates are checked (see `MercyGate`).
    """

    family: str = "A"
    layers: tuple[int, ...] = tuple(range(12))
    rank: int = 8
    apply_to: str = "KV"
    corrupted_layers: str = "all"  # "all": faults hit storage; "protected": faults on the protected layers only
    objectives: tuple[Objective, ...] = (RepairObjective(),)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    mixture: Mixture = field(default_factory=Mixture)
    bank: BankConfig = BankConfig()
    steps: int = 300  # 0: the operators as they are before training
    batch: int = 16  # samples per run and step
    lr: float = 3e-3
    clip: float = 1.0  # gradient norm per run
    checkpoint_every: int = 50
    quantiser: QuantiserConfig | None = None
    gate: MercyGate | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the family
    schedule: str = "constant"  # of the learning rate; "linear": falling to nothing at the last step

    def __post_init__(self) -> None:
        # NumPy's would give the operators another name
        limits = {"rank": (1, None), "steps": (0, MOST_STEPS), "batch": (1, None), "checkpoint_every": (1, None)}
        for name, (least, most) in limits.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least, most))
        for name in ("layers", "seeds"):
            object.__setattr__(self, name, whole_numbers(name, getattr(self, name)))
        if self.corrupted_layers not in ("all", "protected"):
            raise ValueError(f"corrupted_layers must be 'all' or 'protected', not {self.corrupted_layers!r}")
        if self.schedule not in ("constant", "linear"):
            raise ValueError(f"schedule must be 'constant' or 'linear', not {self.schedule!r}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must be distinct and at least one, not {self.seeds}")
        if not self.objectives:
            raise ValueError("objectives must hold at least one condition")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        largest = max(self.batch, self.gate.probe if self.gate and self.gate.simulates else 0)
        if self.bank.samples < largest * len(self.seeds):
            raise ValueError(
                f"a bank of {self.bank.samples} samples is too small for {len(self.seeds)} seeds with batches of "
                f"{largest}: different seeds share no sample"
            )
        if self.valence_objectives and self.bank.decoded < 2:
            raise ValueError(
                f"the valence objective looks 2 or more tokens ahead; the bank has {self.bank.decoded} decoded: raise "
                "BankConfig.decoded"
            )

    @property
    def runs(self) -> int:
        return len(self.seeds) * len(self.objectives)

    @property
    def valence_objectives(self) -> list[ValenceObjective]:
        return [o for o in self.objectives if isinstance(o, ValenceObjective)]

    @property
    def repairs(self) -> bool:
        """Whether the operator takes part."""
        return self.quantiser is None or self.quantiser.trained != "steps"

    @property
    def learns_steps(self) -> bool:
        """Whether the steps of a quantiser are learned."""
        return self.quantiser is not None and self.quantiser.trained != "repair"

    @property
    def needs_valence(self) -> bool:
        """Whether a valence head takes part."""
        return bool(self.valence_objectives) or self.gate is not None

    @property
    def observes_valence(self) -> bool:
        """Whether each step needs the view of `cachemedic.training.valence.step`."""
        return bool(self.valence_objectives)

    @property
    def first_layer(self) -> int:
        """Where the student starts: the first layer with a fault, a repair or few bits, or 0 to simulate futures."""
        whole = self.corrupted_layers == "all" or self.quantiser is not None or self.needs_valence
        return 0 if whole else min(self.layers)

    def runs_of(self, condition: int) -> list[int]:
        """The runs of one condition, a run a seed."""
        if not 0 <= condition < len(self.objectives):
            raise ValueError(f"condition {condition} is out of range: there are 0 to {len(self.objectives) - 1}")
        return list(range(condition, self.runs, len(self.objectives)))

    def key(self, base: Base) -> str:
        """The name of the trained operators: a hash of this configuration and of the base."""
        # what is not used is left out: sweeps without it keep the keys that they had before it existed
        unused = {name for name in ("quantiser", "gate", "options") if not getattr(self, name)}
        unused |= {"schedule"} if self.schedule == "constant" else set()
        fields = asdict(self) | {"bank": self.bank.defined()}
        defined: list[object] = [{k: v for k, v in fields.items() if k not in unused}]
        defined += [base.name, weights_digest(base)]
        defined += [head_digest(base)] if self.needs_valence else []
        statistics = family_class(self.family).shipped_statistics(base.name)
        defined += [] if statistics is None else [statistics]
        shape = ModelShape.of(base.model.config)
        calibrated, cache_shape = base.severity_map or shipped_map(), (shape.num_layers, shape.num_kv_heads, 0)
        recalibrated = calibrated.digest_beside(shipped_map(), self.mixture.weights, self.mixture.base, cache_shape)
        defined += [recalibrated] if recalibrated else []
        text = json.dumps(defined, sort_keys=True, default=str)
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


def sweep_objective(objectives: tuple[Objective, ...], seeds: int) -> Callable[[StepOutputs], dict[str, torch.Tensor]]:
    """The losses of all runs, seed-major: `loss` and the parts of any condition, [R] each; NaN where a run has none."""
    repair = [c for c, o in enumerate(objectives) if isinstance(o, RepairObjective)]
    groups: list[tuple[list[int], Objective]] = []
    if repair:
        stacked = stack_objectives(tuple(o for o in objectives if isinstance(o, RepairObjective)), seeds)
        if len(repair) == len(objectives):
            return stacked
        groups.append((repair, stacked))
    groups += [([c], o) for c, o in enumerate(objectives) if isinstance(o, ValenceObjective)]

    def losses(step: StepOutputs) -> dict[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = {}
        for conditions, objective in groups:
            runs = [seed * len(objectives) + c for seed in range(seeds) for c in conditions]
            for name, values in objective(step.select(runs)).items():
                missing = torch.full((len(step.z_rep),), torch.nan, dtype=values.dtype, device=values.device)
                parts[name] = parts.get(name, missing).index_put((torch.tensor(runs, device=values.device),), values)
        return parts

    return losses
