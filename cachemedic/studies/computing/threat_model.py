"""Threat model (notebook 02): what corruption costs, and the map from severities to parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pandas as pd

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption import severity
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation import severity_calibration
from cachemedic.evaluation.decoding import CleanBank, clean_pass
from cachemedic.evaluation.experiments import EXAMPLES, run_grid, standard_tasks
from cachemedic.models.load import Base, load_base
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import intervals

SMOKE_EXAMPLES = {"perplexity": 4, "sentiment": 4, "needle": 2}
COLUMNS = [
    *("base", "task", "type", "severity", "parameter", "share", "damage", "damage_low", "damage_high"),
    *("score", "score_low", "score_high", "kl", "n_seeds", "n_examples"),
]


@cache
def calibration(name: str, device: str, smoke: bool) -> tuple[Base, TaskData, CleanBank]:
    """A base, the texts on which its severities are calibrated, and its clean pass over them."""
    base = load_base(name, device=device)
    task = standard_tasks(base, "calibration", [0], {"perplexity": 24 if smoke else 96})["perplexity"]
    return base, task, clean_pass(base.model, task)


def context_value(base: Base, task: TaskData, clean: CleanBank) -> pd.DataFrame:
    """One row: the loss with the prefix in the cache and with the prefix erased; their difference is its value."""
    erased = severity_calibration.context_value(base, task, clean)
    row = {
        "base": base.name,
        "nll_clean": erased["nll_clean"].mean(),
        "nll_erased": erased["nll_erased"].mean(),
        "context_value": (erased["nll_erased"] - erased["nll_clean"]).mean(),
        "n_examples": len(erased),
    }
    return pd.DataFrame([row])


def damage(run: Run, base: Base) -> pd.DataFrame:
    """What the calibrated parameters do to the three tasks, as a share of the value of the context."""
    tasks = standard_tasks(base, "test", run.parameters["seeds"], SMOKE_EXAMPLES if run.smoke else EXAMPLES)
    grid = run_grid(base, tasks, {"none": NoDefense()}, run.partial)
    erased = {
        name: severity_calibration.context_value(base, task, clean_pass(base.model, task))
        for name, task in tasks.items()
    }
    worth = {name: (rows.nll_erased - rows.nll_clean).mean() for name, rows in erased.items()}
    measured = intervals(grid.assign(nll=(grid.nll - grid.nll_clean) / grid.task.map(worth)))
    names = {"nll": "damage", "nll_low": "damage_low", "nll_high": "damage_high"}
    return measured.rename(columns=names).assign(base=base.name)[COLUMNS]


def ship(found: SeverityMap) -> SeverityMap:
    """The map that ships with the library, replaced if calibration finds other types, or numbers more than 1% off.

    Processors differ in the last digits, and which positions a severity hits follows from the last digit of its share.
    """
    bases = found.rows.groupby("base")["type"].unique()
    shape = (0, 0, 0)  # bases are given by name
    if not severity.MAP.exists() or any(
        found.digest_beside(severity.shipped_map(), types, base, shape) for base, types in bases.items()
    ):
        severity.write_map(found.rows)
    return severity.shipped_map()


def results(run: Run) -> dict[str, pd.DataFrame]:
    names = dict.fromkeys((run.parameters["base"], run.parameters["second"]))
    calibrated = {name: calibration(name, run.parameters["device"], run.smoke) for name in names}
    value = pd.concat([context_value(*given) for given in calibrated.values()], ignore_index=True)
    maps = {name: severity_calibration.calibrate_severities(*given) for name, given in calibrated.items()}
    curves = pd.concat([curve.assign(base=name) for name, (curve, _) in maps.items()])
    mapped = pd.concat([rows for _, rows in maps.values()])
    severities = SeverityMap(mapped)
    if not run.smoke and run.notebook and all(name.startswith("embedded-") for name in names):
        severities = ship(severities)
    rows = pd.concat([damage(run, replace(base, severity_map=severities)) for base, _, _ in calibrated.values()])
    return {"context_value": value, "damage_curves": curves, "severity_map": mapped, "threat_model": rows}
