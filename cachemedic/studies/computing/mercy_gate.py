"""The mercy gate where it has something to protect (notebook 19): learning rates at which training loses valence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.gate_report import agreement, checks_of, cost, outcome, projected_ratio, training_curves
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, text_grid, train
from cachemedic.studies.sweeps import defenses_of, standard_config
from cachemedic.training.config import TrainConfig
from cachemedic.training.objective import RepairObjective
from cachemedic.training.valence.gate import LEAST_PROBE, MercyGate

STEPS = 40
LEARNING_RATES = (0.3, 1.0, 3.0)
THRESHOLD = MercyGate.threshold
PROMPTS = 64  # a seed, held out
SEVERITIES = (0.5, 1.0)
UNGATED = "no gate"


def standard(run: Run, base: Base) -> TrainConfig:
    """What the conditions vary: under the canonical objective without the contraction term, so that A responds."""
    given = run.parameters
    # reviews besides documentation, as under the valence objective, so that there is valence to lose
    config = standard_config(base, given["family"], given["seeds"], run.smoke, STEPS, "valence")
    objective = config.objectives[0] if given["objective"] == "valence" else RepairObjective(lambda_contr=0.0)
    samples = max(config.bank.samples, LEAST_PROBE * len(config.seeds))
    bank = replace(config.bank, samples=samples)
    return replace(config, objectives=(objective,), bank=bank, batch=min(config.batch, 8))


def gates(config: TrainConfig) -> dict[str, MercyGate]:
    """One that only watches and two that block; none ends the training, as what it blocks is to be counted."""
    common: dict[str, Any] = {"both": True, "patience": config.steps + 1}
    return {
        UNGATED: MercyGate(threshold=0, **common),
        "gate: rollouts": MercyGate(**common),
        "gate: proxy": MercyGate("proxy", **common),
    }


def ungated(run: Run, base: Base) -> dict[float, TrainConfig]:
    """Training that is checked and not gated, by learning rate."""
    config = standard(run, base)
    rates = LEARNING_RATES[-2:] if run.smoke else LEARNING_RATES
    return {rate: replace(config, lr=rate, gate=gates(config)[UNGATED]) for rate in rates}


def gated(run: Run, base: Base, rate: float) -> dict[str, TrainConfig]:
    """Training at one learning rate by gate."""
    config = replace(standard(run, base), lr=rate)
    return {name: replace(config, gate=gate) for name, gate in gates(config).items()}


def chosen(rates: pd.DataFrame) -> float:
    """The least learning rate at which most runs end below the threshold on validation, else the one of most."""
    below = (rates["ratio"] < THRESHOLD).groupby(rates["learning_rate"]).mean()
    lost = below[below > 0.5]
    return float(lost.index.min() if len(lost) else below.idxmax())


def folders_of(run: Run, base: Base, conditions: Mapping[Any, TrainConfig]) -> dict[str, Path]:
    """Where operators lie beside their logs, by a name for each condition; a learning rate is one of no gate."""
    named = {f"{UNGATED}, rate {name:g}" if isinstance(name, float) else name: c for name, c in conditions.items()}
    return {name: run.trained / config.key(base) for name, config in named.items()}


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    prompts = LEAST_PROBE if run.smoke else PROMPTS

    def held_out(config: TrainConfig, operator: RepairOperator | None, split: str) -> pd.DataFrame:
        return projected_ratio(base, config, operator, split, prompts)

    by_rate = ungated(run, base)
    rates = pd.concat(
        [
            held_out(by_rate[rate], operator, "validation").assign(learning_rate=rate)
            for rate, operator in train(run, base, by_rate).items()
        ],
        ignore_index=True,
    )
    rate = chosen(rates)
    conditions = gated(run, base, rate)
    operators = train(run, base, conditions)
    final = {name: held_out(conditions[name], operator, "test") for name, operator in operators.items()}
    final = {"none": held_out(by_rate[rate], None, "test"), **final}
    ratios = pd.concat([rows.assign(reader=name) for name, rows in final.items()], ignore_index=True)
    folders = folders_of(run, base, conditions)
    checks = checks_of(folders)
    rows = text_grid(run, base, defenses_of(base, operators), 3 if run.smoke else 16, severities=SEVERITIES)
    return {
        "gate_learning_rates": rates.assign(chosen=rates["learning_rate"] == rate),
        "mercy_gate": checks,
        "gate_agreement": agreement(checks, THRESHOLD),
        "gate_valence": ratios,
        "gate_results": outcome(ratios, rows, UNGATED),
        "gate_cost": cost(conditions, checks),
        "gate_grid": rows,
        "gate_curves": training_curves(
            {**folders_of(run, base, by_rate), **{n: f for n, f in folders.items() if n != UNGATED}}
        ),
    }
