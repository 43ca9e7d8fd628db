"""Second model (notebook 13): the main result and the contraction sweep on any base and any text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from cachemedic.core.severity_map import SeverityMap
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.evaluation.experiments import run_grid, standard_tasks
from cachemedic.models.load import Base, load_base
from cachemedic.studies import second_model
from cachemedic.studies.computing import contraction
from cachemedic.studies.contraction import measure_contraction
from cachemedic.studies.family_evaluation import bytes_per_token
from cachemedic.studies.run import Run
from cachemedic.studies.setting import severities_of, train, unseen_bank
from cachemedic.studies.summaries import advantage, in_order, means_over_seeds, recovery_by_type, summary
from cachemedic.studies.sweeps import contraction_sweep, defenses_of, standard_config
from cachemedic.training.bank import open_bank
from cachemedic.training.config import TrainConfig

BOUNDS = ("rho", "bound_rank", "bound_full", "shared_rank", "rank_floor")


def main_grid(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """Language modelling at all severities, the other tasks at two."""
    tasks = second_model.main_tasks(base, source, "test", run.parameters["seeds"], run.smoke)
    words = {"perplexity": tasks.pop("perplexity")}
    at = (0.5,) if run.smoke else (0.5, 1.0)
    grids = [
        run_grid(base, words, readers, run.partial / "words", severities=severities_of(run)),
        run_grid(base, tasks, readers, run.partial / "tasks", severities=at),
    ]
    return pd.concat(grids, ignore_index=True).assign(base=base.name)


def sweep(run: Run, base: Base, source: TextSource) -> dict[str, TrainConfig]:
    """The conditions of notebook 04 on this base and text."""
    standard = standard_config(base, "A", run.parameters["seeds"], run.smoke, contraction.STEPS)
    return contraction_sweep(second_model.on_text(standard, source))


def swept(run: Run, base: Base, source: TextSource, undefended: Defense) -> tuple[pd.DataFrame, pd.DataFrame]:
    """rho of every condition of the sweep, and a summary of each with what it undoes."""
    seeds, configs = run.parameters["seeds"], sweep(run, base, source)
    operators = train(run, base, configs)
    task = standard_tasks(base, "test", seeds, {"perplexity": 2 if run.smoke else 8}, source)
    readers: dict[str, Defense] = {"none": undefended, **defenses_of(base, operators)}
    grid = run_grid(base, task, readers, run.partial / "contraction", severities=severities_of(run))
    bank = open_bank(base, unseen_bank(run, 2 if run.smoke else 8, source))
    rho = measure_contraction(base, configs[contraction.DEFAULT], operators, bank, severities=(0.5,))
    means = means_over_seeds(rho, ["condition"], BOUNDS).rename(columns={"condition": "reader"})
    gains = advantage(grid, contraction.WITHOUT).drop(columns=["task", "n_seeds"])
    rows = summary(grid).merge(means.drop(columns="n_seeds"), on="reader").merge(gains, on="reader")
    rows = in_order(rows, "reader", configs)
    return rho.assign(base=base.name), rows.assign(base=base.name, reference=contraction.WITHOUT)


def results(run: Run, source: TextSource) -> dict[str, pd.DataFrame]:
    """`source`: the text; what the parameters record of it are names and a digest."""
    base, seeds = load_base(run.parameters["base"], device=run.parameters["device"]), run.parameters["seeds"]
    base = replace(base, severity_map=SeverityMap(second_model.severity_map(base, source, run.smoke)))
    blind = second_model.blind_readers(base, source, seeds, run)
    best = list(blind)[-1]
    operators = train(run, base, second_model.main_configs(base, source, seeds, run.smoke))
    compared: dict[str, Defense] = {**blind, **defenses_of(base, operators)}
    grid = main_grid(run, base, source, compared)
    overall = summary(grid).merge(bytes_per_token(base, compared), on="reader")
    overall = in_order(overall, "reader", compared).assign(base=base.name, setting="standard")
    overall = in_order(overall, "task", grid.task.unique()).assign(best_heuristic=lambda rows: rows.reader == best)
    rho, rows = swept(run, base, source, blind["none"])
    return {
        "second_model_grid": grid,
        "second_model_results": overall,
        "second_model_by_type": recovery_by_type(grid).assign(base=base.name),
        "second_model_rho": rho,
        "second_model_contraction": rows,
    }
