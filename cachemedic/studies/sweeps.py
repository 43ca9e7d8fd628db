"""Sweeps over what defines a trained operator: conditions by name, trained in as few loops as they allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from cachemedic.core.errors import nearest_valid
from cachemedic.defenses.defense import Defense
from cachemedic.models.load import Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.registry import family_class
from cachemedic.studies.family_study import token_aware_config
from cachemedic.studies.run import Run
from cachemedic.training.bank import WITH_REVIEWS, BankConfig
from cachemedic.training.config import TrainConfig
from cachemedic.training.kept_operators import load_or_train
from cachemedic.training.objective import RepairObjective
from cachemedic.training.valence.objective import ValenceObjective

Name = TypeVar("Name")

OBJECTIVES = ("canonical", "valence")
SAMPLES = 256  # texts of the bank for each seed
FUTURE = 4  # tokens that the valence objective looks ahead
CONTRACTION_WEIGHTS = (0.0, 0.1, 0.5, 1.0)
CONTRACTION_TARGETS = (0.5, 0.95)  # beside the default, 0.8
ALONE = 1000.0  # a weight of the contraction term beside which distillation does not count
PLACES = ("early", "mid", "late")


def standard_config(
    base: Base, family: str, seeds: Sequence[int], smoke: bool, steps: int = 300, objective: str = "canonical"
) -> TrainConfig:
    """The standard setting, faults on and repair of all layers, from which conditions are made by `replace`.

    `steps` are those of families that act inside attention; others train as the family study trains D and E. The
    "valence" objective sees reviews besides documentation, so that its sequences differ in valence. Raises `ValueError`
    for another objective or an unknown family.
    """
    if objective not in OBJECTIVES:
        raise nearest_valid("objective", objective, OBJECTIVES)
    if not family_class(family).repairs_tokens:
        layers = tuple(range(base.config.num_hidden_layers))
        bank = BankConfig(samples=(8 if smoke else SAMPLES) * len(seeds))
        steps, batch = (4, 4) if smoke else (steps, TrainConfig.batch)
        config = TrainConfig(family=family, layers=layers, seeds=tuple(seeds), bank=bank, steps=steps, batch=batch)
    else:
        config = token_aware_config(base, family, seeds, smoke)
    if objective == "canonical":
        return config
    bank = replace(config.bank, split=config.bank.split + WITH_REVIEWS, decoded=FUTURE)
    return replace(config, objectives=(ValenceObjective(),), bank=bank)


def contraction_sweep(standard: TrainConfig) -> dict[str, TrainConfig]:
    """Conditions that differ in the contraction term: its weight, its target, and the term alone (no identity term).

    Raises `ValueError` for another than the canonical objective, which alone has this term.
    """
    if standard.valence_objectives:
        raise ValueError("the contraction term is one of the canonical objective: objective must be 'canonical'")
    objectives = [RepairObjective(lambda_contr=weight) for weight in CONTRACTION_WEIGHTS]
    objectives += [RepairObjective(alpha_contr=target) for target in CONTRACTION_TARGETS]
    named = {f"lambda {o.lambda_contr:g}, alpha {o.alpha_contr:g}": o for o in objectives}
    named["contraction alone"] = RepairObjective(lambda_contr=ALONE, alpha_contr=0.0, lambda_id=0.0)
    return {name: replace(standard, objectives=(objective,)) for name, objective in named.items()}


def with_and_without_contraction(standard: TrainConfig) -> dict[str, TrainConfig]:
    """Conditions "contraction" and "no contraction"; of the valence objective, which has no such term, "valence"."""
    (objective,) = standard.objectives
    if not isinstance(objective, RepairObjective):
        return {"valence": standard}
    free = replace(objective, lambda_contr=0.0)
    return {"contraction": standard, "no contraction": replace(standard, objectives=(free,))}


def rank_sweep(standard: TrainConfig, ranks: Sequence[int]) -> dict[str, TrainConfig]:
    """Conditions "rank r" that differ in the rank. Raises `ValueError` for a family without one."""
    if family_class(standard.family).repairs_tokens:
        raise ValueError(f"family {standard.family} has no rank; allowed are A, B, C")
    return {f"rank {rank}": replace(standard, rank=rank) for rank in ranks}


def defenses_of(base: Base, operators: Mapping[str, RepairOperator]) -> dict[str, Defense]:
    """Each operator as a defense of the base's model."""
    return {name: operator.defense(base.model) for name, operator in operators.items()}


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


def stacks(base: Base, conditions: Mapping[str, TrainConfig]) -> list[tuple[TrainConfig, list[str]]]:
    """What trains the `conditions` of one objective each: configurations, and the names of their conditions in order.

    Those that differ in nothing but their objective train as one stack, with common data and draws. Raises
    `ValueError` for a condition of several objectives.
    """
    named: dict[str, list[str]] = {}
    for name, config in conditions.items():
        if len(config.objectives) != 1:
            raise ValueError(f"condition {name!r} must have one objective, not {len(config.objectives)}")
        named.setdefault(replace(config, objectives=(RepairObjective(),)).key(base), []).append(name)
    return [
        (replace(conditions[names[0]], objectives=tuple(conditions[name].objectives[0] for name in names)), names)
        for names in named.values()
    ]


def by_condition(stack: RepairOperator, names: Sequence[str]) -> dict[str, RepairOperator]:
    """The operators of each condition of a stack, one run a seed, by its name; runs are seed-major."""
    runs = {name: range(i, stack.runs, len(names)) for i, name in enumerate(names)}
    return {name: RepairOperator.stack([stack.select(run) for run in own]) for name, own in runs.items()}


def trained(
    base: Base, configs: Mapping[Name, TrainConfig], run: Run, retrain: bool = False
) -> dict[Name, RepairOperator]:
    """The operators of named conditions, those that are kept or newly trained ones (`retrain`: all of them).

    Where the run has a cluster, and two or more are to be trained, each is a job: a stack with all its seeds, since
    seeds divide one bank of texts between them and share every pass of the model.
    """
    retrain = retrain or run.retrain
    missing = [c for c in configs.values() if retrain or not (run.trained / c.key(base) / "config.json").exists()]
    if run.cluster is not None and len(missing) > 1:
        load = base.name, base.model.device.type, base.model.dtype, base.severity_map
        given = run.trained, run.work, retrain
        run.cluster.run((config.key(base), _train_as_job, (load, config, *given)) for config in missing)
        retrain = False
    return {
        name: load_or_train(base, config, run.trained, run.work, retrain=retrain) for name, config in configs.items()
    }


def _train_as_job(load: tuple[Any, ...], config: TrainConfig, *given: Any) -> None:
    load_or_train(load_base(*load), config, *given)


def train_sweep(
    base: Base, conditions: Mapping[str, TrainConfig], run: Run, retrain: bool = False
) -> dict[str, RepairOperator]:
    """The operators of every condition, a stack of one run a seed. `conditions` are those of `stacks`."""
    stacked = {tuple(names): config for config, names in stacks(base, conditions)}
    operators: dict[str, RepairOperator] = {}
    for names, stack in trained(base, stacked, run, retrain).items():
        operators |= by_condition(stack, names)
    return {name: operators[name] for name in conditions}
