"""Sweeps over what defines a trained operator: conditions by name, trained in as few loops as they allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cachemedic.bank import BankConfig
from cachemedic.models import Base
from cachemedic.objective import RepairObjective
from cachemedic.operator_config import nearest_valid
from cachemedic.operators import RepairOperator
from cachemedic.train import load_or_train
from cachemedic.train_config import TrainConfig

SAMPLES = 256  # texts of the bank for each seed
CONTRACTION_WEIGHTS = (0.0, 0.1, 0.5, 1.0)
CONTRACTION_TARGETS = (0.5, 0.95)  # beside the default, 0.8
ALONE = 1000.0  # a weight of the contraction term beside which distillation does not count
PLACES = ("early", "mid", "late")


def standard_config(base: Base, family: str, seeds: Sequence[int], smoke: bool, steps: int = 300) -> TrainConfig:
    """The standard setting, faults on and repair of all layers, from which conditions are made by `replace`."""
    layers = tuple(range(base.model.config.num_hidden_layers))
    if smoke:
        bank = BankConfig(samples=8 * len(seeds))
        return TrainConfig(family=family, layers=layers, seeds=tuple(seeds), bank=bank, steps=4, batch=4)
    bank = BankConfig(samples=SAMPLES * len(seeds))
    return TrainConfig(family=family, layers=layers, seeds=tuple(seeds), bank=bank, steps=steps)


def contraction_sweep(standard: TrainConfig) -> dict[str, TrainConfig]:
    """Conditions that differ in the contraction term: its weight, its target, and the term alone (no identity term)."""
    objectives = [RepairObjective(lambda_contr=weight) for weight in CONTRACTION_WEIGHTS]
    objectives += [RepairObjective(alpha_contr=target) for target in CONTRACTION_TARGETS]
    named = {f"lambda {o.lambda_contr:g}, alpha {o.alpha_contr:g}": o for o in objectives}
    named["contraction alone"] = RepairObjective(lambda_contr=ALONE, alpha_contr=0.0, lambda_id=0.0)
    return {name: replace(standard, objectives=(objective,)) for name, objective in named.items()}


def block(depth: int, size: int, place: str) -> tuple[int, ...]:
    """`size` layers in a row of a model of `depth`: its first ("early"), middle ("mid") or last ("late") ones.

    Raises `ValueError` for another place, or more layers than there are.
    """
    if place not in PLACES:
        raise nearest_valid("place of a block", place, PLACES)
    if not 1 <= size <= depth:
        raise ValueError(f"a block of {size} layers does not fit a model of {depth}")
    first = {"early": 0, "mid": (depth - size) // 2, "late": depth - size}[place]
    return tuple(range(first, first + size))


def train_sweep(
    base: Base, conditions: Mapping[str, TrainConfig], trained: Path, work: Path, retrain: bool = False
) -> dict[str, RepairOperator]:
    """The operators of every condition, a stack of one run a seed.

    Each condition has one objective. Those that differ in nothing else train as one stack, with common data and draws.
    `trained`, `work` and `retrain` are those of `load_or_train`. Raises `ValueError` for a condition of several
    objectives.
    """
    stacks: dict[str, list[str]] = {}
    for name, config in conditions.items():
        if len(config.objectives) != 1:
            raise ValueError(f"condition {name!r} must have one objective, not {len(config.objectives)}")
        stacks.setdefault(replace(config, objectives=(RepairObjective(),)).key(base), []).append(name)
    operators = {}
    for names in stacks.values():
        objectives = tuple(conditions[name].objectives[0] for name in names)
        stack = load_or_train(base, replace(conditions[names[0]], objectives=objectives), trained, work, retrain)
        for i, name in enumerate(names):  # runs are seed-major
            runs = range(i, stack.runs, len(names))
            operators[name] = RepairOperator.stack([stack.select(run) for run in runs])
    return {name: operators[name] for name in conditions}
