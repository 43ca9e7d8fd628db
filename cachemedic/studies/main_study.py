"""The main results (notebook 03): how operator A is trained in each setting, and what is measured on one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from cachemedic.core.severity_map import GRID
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import blind_defenses, oracles
from cachemedic.evaluation.experiments import calibration_of, run_grid, standard_tasks
from cachemedic.evaluation.statistics import best_heuristic
from cachemedic.models.load import Base
from cachemedic.studies.family_evaluation import HEURISTICS, bytes_per_token
from cachemedic.studies.summaries import robustness
from cachemedic.studies.sweeps import block, standard_config
from cachemedic.training.config import TrainConfig

EXAMPLES = {"perplexity": 8, "sentiment": 12, "needle": 4}  # per seed
SMOKE_EXAMPLES = dict.fromkeys(EXAMPLES, 2)
BLOCK_SIZE = 4  # layers of the protected block


@dataclass(frozen=True)
class MainResult:
    """The grid of a base, with a column setting; what each reader keeps; the name of the best blind heuristic."""

    grid: pd.DataFrame
    kept: pd.DataFrame
    heuristic: str


def settings(base: Base) -> dict[str, tuple[tuple[int, ...], str]]:
    """The two settings of the main results: protected layers, and which layers faults hit ("all", or "protected")."""
    depth = base.config.num_hidden_layers
    return {
        "standard": (tuple(range(depth)), "all"),
        "protected block": (block(depth, min(BLOCK_SIZE, depth), "mid"), "protected"),
    }


def linear_configs(base: Base, seeds: Sequence[int], smoke: bool = False) -> dict[str, TrainConfig]:
    """How operator A is trained in each of the `settings`, one run a seed."""
    standard = standard_config(base, "A", seeds, smoke)
    return {
        setting: replace(standard, layers=layers, corrupted_layers=hit)
        for setting, (layers, hit) in settings(base).items()
    }


def best_blind(base: Base, blind: Mapping[str, Defense], validation: Mapping[str, TaskData], folder: Path) -> str:
    """The name of the blind heuristic of the highest mean AUC over `validation` tasks; `folder` as in `run_grid`."""
    grid = run_grid(base, validation, blind, folder, severities=(0.25, 1.0))
    return best_heuristic(robustness(grid[grid["reader"] != "none"]))


def measure(
    base: Base,
    linear: Mapping[str, Defense],
    token_aware: Mapping[str, Defense],
    seeds: Sequence[int],
    folder: Path,
    smoke: bool = False,
) -> MainResult:
    """Every reader of the main results on one base, test split; `folder` as in `run_grid`.

    `linear` holds operator A by setting, `token_aware` D, E and the repairs of tokens beside them, by the names to
    report. Language modelling, standard setting: all severities, all readers. Sentiment and needles: from severity 0.25
    on, no defence, the best heuristic, the operators. Oracles, and the protected block, on language modelling.
    """
    examples = SMOKE_EXAMPLES if smoke else EXAMPLES
    severities = (0.5,) if smoke else GRID
    calibration = calibration_of(base)
    blind, with_mask = blind_defenses(calibration), oracles(calibration)
    few = {task: max(2, n // 2) for task, n in examples.items()}
    heuristic = best_blind(base, blind, standard_tasks(base, "validation", seeds[:2], few), folder / "validation")
    tasks = standard_tasks(base, "test", seeds, examples)
    words = {"perplexity": tasks.pop("perplexity")}
    standard, protected = settings(base)
    repairs = {"operator A": linear[standard], **token_aware}
    undefended = {"none": blind["none"]}
    clipping = {name: blind[name] for name in HEURISTICS}
    cases: list[tuple[str, Mapping[str, TaskData], Mapping[str, Defense], Sequence[float]]] = [
        (standard, words, {**blind, **repairs}, severities),
        (standard, tasks, {**undefended, heuristic: blind[heuristic], **repairs}, severities[-3:]),
        (f"{standard}, mask known", words, {**undefended, **with_mask}, severities),
        (protected, words, {**clipping, "operator A": linear[protected]}, severities),
    ]
    grids = []
    for setting, of_setting, readers, at in cases:
        kept_in = folder / setting.replace(" ", "_") / "_".join(of_setting)
        layers = settings(base)[protected][0] if setting == protected else "all"
        grid = run_grid(base, of_setting, readers, kept_in, layers=layers, severities=at)
        grids.append(grid.assign(setting=setting))
    kept = bytes_per_token(base, {**blind, **repairs, **with_mask})
    return MainResult(pd.concat(grids, ignore_index=True), kept, heuristic)
