"""What the studies share: the base of a run, its operators, and language modelling on the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cachemedic.core.severity_map import GRID, SeverityMap
from cachemedic.corruption.spec import Axis
from cachemedic.data.text_source import EMBEDDED_TEXT, TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.experiments import TYPES, run_grid, standard_tasks
from cachemedic.models.load import Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.run import Run
from cachemedic.studies.sweeps import by_condition, stacks, standard_config, train_sweep
from cachemedic.training.bank import BankConfig
from cachemedic.training.config import TrainConfig


def base_of(run: Run, parameter: str = "base") -> Base:
    """The base that a parameter of the run names, with the severities of the run."""
    calibrated = SeverityMap(run.read_csv("severity_map"))
    return load_base(run.parameters[parameter], device=run.parameters["device"], severity_map=calibrated)


def bases_of(run: Run) -> dict[str, Base]:
    """The bases that the parameters `base` and `second` name, by name; one if these are the same."""
    named = {run.parameters[parameter]: parameter for parameter in ("second", "base")}
    return {name: base_of(run, parameter) for name, parameter in reversed(named.items())}


def standard_of(run: Run, base: Base, steps: int = 300) -> TrainConfig:
    """`sweeps.standard_config` for the parameters of the run; it has an objective if the run has none of its own."""
    given = run.parameters
    return standard_config(base, given["family"], given["seeds"], run.smoke, steps, given.get("objective", "canonical"))


def train(run: Run, base: Base, conditions: Mapping[Any, TrainConfig]) -> dict[Any, RepairOperator]:
    """The operators of every condition: those that ship, or newly trained ones in the smoke profile."""
    return train_sweep(base, conditions, run, retrain=run.smoke)


def shipped(run: Run, base: Base, conditions: Mapping[str, TrainConfig]) -> dict[str, RepairOperator]:
    """The operators of every condition as they ship. Raises `FileNotFoundError` if one does not."""
    found: dict[str, RepairOperator] = {}
    for config, names in stacks(base, conditions):
        found |= by_condition(RepairOperator.from_pretrained(run.trained / config.key(base)), names)
    return {name: found[name] for name in conditions}


def severities_of(run: Run) -> tuple[float, ...]:
    """The severities of a grid: all of them, or one in the smoke profile."""
    return (0.5,) if run.smoke else GRID


def unseen_bank(run: Run, samples: int, source: TextSource = EMBEDDED_TEXT) -> BankConfig:
    """Texts of the test split, `samples` a seed, on which contraction is measured."""
    return BankConfig(split="test", samples=samples * len(run.parameters["seeds"]), source=source)


def text_grid(
    run: Run,
    base: Base,
    readers: Mapping[str, Defense],
    examples: int,
    part: str = "",
    layers: Axis = "all",
    types: Sequence[str] = TYPES,
    severities: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Language modelling with no defence ("none") and some readers: `run_grid`, on `examples` texts a seed.

    part: a name for this grid among those of the run; severities: `severities_of` the run if not given.
    """
    tasks = standard_tasks(base, "test", run.parameters["seeds"], {"perplexity": examples})
    readers = {"none": NoDefense(), **readers}
    return run_grid(base, tasks, readers, run.partial / part, layers, types, severities or severities_of(run))
