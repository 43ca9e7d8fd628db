"""Real faults (notebook 14): flipped bits, pages of other requests, and quantised caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from cachemedic.corruption.storage_faults import FAULT_GRID
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.experiments import standard_tasks
from cachemedic.models.load import Base, load_base
from cachemedic.studies.family_evaluation import bytes_per_token, code_alone, comparison_defenses, token_repairs
from cachemedic.studies.family_study import headline
from cachemedic.studies.fault_grid import Guarded, fault_summary, run_faults
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import by_group

FAULTS: Mapping[str, Sequence[float]] = {
    **{name: FAULT_GRID[name] for name in ("bitflip_bf16", "kivi_quant")},
    "page_swap": (0.125, 0.5, 1.0),
    "stale_page": (0.125, 0.5, 1.0),
    **{f"bitflip_{kind}": (1e-3,) for kind in ("bf16_exponent", "fp16", "fp32", "int8")},
}
STORAGE_DEFENSES = (
    *("recompute", "checksum_recompute_2", "checksum_erase", "secded_ecc_in_page", "secded_ecc_restricted"),
    *("shadow_1bit", "low_rank_shadow_3pct"),
)


def readers_on(run: Run, base: Base) -> dict[str, Defense]:
    """Every reader of a base, by name."""
    heuristics, storage = comparison_defenses(base, 8 if run.smoke else 64)
    found = token_repairs(base, headline(base, run.parameters["seeds"], run.smoke), run)
    blind: dict[str, Defense] = {"none": NoDefense(), "guard": Guarded(NoDefense())}
    blind["range_restriction"] = Guarded(heuristics["range_restriction"])
    storage = {name: storage[name] for name in STORAGE_DEFENSES}
    return {**blind, **storage, "E, code alone": code_alone(found["E"]), **found}


def grid(run: Run, base: Base, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """Language modelling through all readers, at every parameter of every fault."""
    faults = {name: parameters[:1] if run.smoke else parameters for name, parameters in FAULTS.items()}
    sizes = {"perplexity": 2 if run.smoke else 4}
    task = standard_tasks(base, "test", run.parameters["seeds"], sizes)["perplexity"]
    return run_faults(base, task, readers, faults, run.partial).assign(base=base.name)


def results(run: Run) -> dict[str, pd.DataFrame]:
    grids, budgets = [], []
    for name in dict.fromkeys((run.parameters["base"], run.parameters["second"])):
        base = load_base(name, device=run.parameters["device"])
        readers = readers_on(run, base)
        budgets.append(bytes_per_token(base, readers).assign(base=base.name))
        grids.append(grid(run, base, readers))
    rows = pd.concat(grids, ignore_index=True)
    summed = by_group(rows, ["base"], fault_summary).merge(pd.concat(budgets), on=["base", "reader"])
    return {"faults_grid": rows, "faults_results": summed}
