"""Operator families (notebook 08): what a repair has to know."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pandas as pd

from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.experiments import TYPES, run_grid, standard_tasks
from cachemedic.models.load import Base
from cachemedic.studies.family_evaluation import (
    bytes_per_token,
    code_alone,
    comparison_defenses,
    linear_operators,
    token_repairs,
)
from cachemedic.studies.family_study import before_training, headline, held_out
from cachemedic.studies.run import Run
from cachemedic.studies.setting import bases_of, severities_of, text_grid
from cachemedic.studies.summaries import advantage, by_group, recovery_by_severity, summary
from cachemedic.studies.sweeps import defenses_of, trained

# Defenses of notebook 14, which measures them under the faults that they are made for.
ELSEWHERE = ("secded_ecc", "secded_ecc_in_page", "secded_ecc_restricted", "shadow_4bit")
# Readers of the other tasks.
HEADLINE = ("none", "clip_renormalise", "A", "D, no ids", "D", "E, code alone", "E", "recompute")
FEW = 3  # seeds of the operators that never saw a type
COMPARED = ("E", "D")  # with every other reader


def examples(run: Run) -> int:
    """Texts a seed."""
    return 2 if run.smoke else 5


def readers_on(run: Run, base: Base) -> dict[str, Defense]:
    """Every reader of a base, by name."""
    seeds = run.parameters["seeds"]
    heuristics, storage = comparison_defenses(base, 8 if run.smoke else 64)
    configs = {**headline(base, seeds, run.smoke), **before_training(base, seeds, run.smoke)}
    found = token_repairs(base, configs, run)
    storage = {name: defense for name, defense in storage.items() if name not in ELSEWHERE}
    linear = linear_operators(base, seeds, run)
    return {**heuristics, **linear, "E, code alone": code_alone(found["E"]), **found, **storage}


def grid(run: Run, base: Base, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """Language modelling with all readers at all severities, and the other tasks with the headline ones at 0.5."""
    words = text_grid(run, base, readers, examples(run), "all")
    sizes = {"sentiment": 2, "needle": 2} if run.smoke else {"sentiment": 8, "needle": 4}
    tasks = standard_tasks(base, "test", run.parameters["seeds"], sizes)
    own = {name: readers[name] for name in HEADLINE}
    others = run_grid(base, tasks, own, run.partial / "tasks", severities=(0.5,))
    return pd.concat([words, others]).assign(base=base.name)


def held_out_grid(run: Run, base: Base) -> pd.DataFrame:
    """Each type, read through D and E fitted to faults of all others."""
    few = run.parameters["seeds"][:FEW]
    kinds = TYPES[:1] if run.smoke else TYPES
    configs = {key: config for key, config in held_out(base, few, run.smoke).items() if key[1] in kinds}
    operators = trained(base, configs, run, run.smoke)
    task = standard_tasks(base, "test", few, {"perplexity": examples(run)})
    parts = []
    for kind in kinds:
        own = {name.removesuffix(", untrained"): operators[name, of] for name, of in operators if of == kind}
        readers = {"none": NoDefense(), **defenses_of(base, own)}
        folder, severities = run.partial / "held_out", severities_of(run)
        parts.append(run_grid(base, task, readers, folder, types=[kind], severities=severities))
    return pd.concat(parts, ignore_index=True).assign(base=base.name)


def results(run: Run) -> dict[str, pd.DataFrame]:
    bases = bases_of(run)
    readers = {name: readers_on(run, base) for name, base in bases.items()}
    budgets = pd.concat([bytes_per_token(base, readers[name]).assign(base=name) for name, base in bases.items()])
    rows = pd.concat([grid(run, base, readers[name]) for name, base in bases.items()], ignore_index=True)
    by_severity = by_group(rows, ["base"], recovery_by_severity)
    means = by_severity.groupby(["base", "task", "reader"]).recovery.mean().rename("mean_recovery").reset_index()
    overall = by_group(rows, ["base"], summary).merge(budgets, on=["base", "reader"])
    words = rows[rows.task == "perplexity"]
    paired = [by_group(words, ["base"], partial(advantage, reference=name)).assign(reference=name) for name in COMPARED]
    held = pd.concat([held_out_grid(run, base) for base in bases.values()], ignore_index=True)
    return {
        "family_grid": rows,
        "family_recovery": by_severity,
        "family_results": overall.merge(means, on=["base", "task", "reader"]),
        "family_paired": pd.concat(paired, ignore_index=True),
        "family_held_out": by_group(held, ["base"], recovery_by_severity),
    }
