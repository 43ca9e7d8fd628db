"""Overhead (notebook 11): what does reading through a defence cost?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from cachemedic.defenses.heuristics import blind_defenses
from cachemedic.evaluation.experiments import calibration_of, run_grid, standard_tasks
from cachemedic.models.load import Base
from cachemedic.studies.bench.decode import gpt2_medium
from cachemedic.studies.bench.readers import OPERATOR, reading_cost
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, train
from cachemedic.studies.summaries import means_over_seeds
from cachemedic.studies.sweeps import defenses_of, standard_config
from cachemedic.token.cache import PAGE

CONTEXTS, ROUNDS = (128, 512, 2048), 13
SMOKE_CONTEXTS, SMOKE_ROUNDS = (32, 64), 7


def cost(run: Run, base: Base) -> pd.DataFrame:
    """Time and memory of a decoding step through every reader, against the tokens in the cache."""
    contexts, rounds = (SMOKE_CONTEXTS, SMOKE_ROUNDS) if run.smoke else (CONTEXTS, ROUNDS)
    model = base.model if run.smoke else gpt2_medium(max(contexts) + PAGE)
    rows = reading_cost(model, contexts, run.parameters["families"], rounds)
    rows["kind"] = np.where(rows.reader.str.startswith(OPERATOR), "operator", "defence")
    return rows


def regression(run: Run, base: Base) -> pd.DataFrame:
    """The clean cost of every reader."""
    seeds, families = run.parameters["seeds"], run.parameters["families"]
    configs = {OPERATOR + family: standard_config(base, family, seeds, run.smoke) for family in families}
    readers = {**blind_defenses(calibration_of(base)), **defenses_of(base, train(run, base, configs))}
    task = standard_tasks(base, "test", seeds, {"perplexity": 3 if run.smoke else 20})
    grid = run_grid(base, task, readers, run.partial, types=())
    grid["clean_regression"] = 100 * np.expm1(grid.nll - grid.nll_clean)
    means = means_over_seeds(grid, ["reader"], ["clean_regression"])
    means["n_examples"] = grid.groupby("reader", sort=False)["n_examples"].sum().to_numpy()
    return means


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    rows = cost(run, base)
    longest, clean = rows[rows.positions == rows.positions.max()], regression(run, base)
    main = run.read_csv("main_results")
    main = main[(main.base == run.parameters["base"]) & (main.setting == "standard") & (main.task == "perplexity")]
    recovered = main[["reader", "recovery", "recovery_low", "recovery_high"]]
    front = longest.merge(clean, on="reader").merge(recovered, on="reader", how="left")
    return {"overhead": rows, "overhead_pareto": front}
