"""Valence-weighted distillation and the learned cache quantiser (notebook 12)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from cachemedic.corruption.apply import Mixture
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import run_grid, standard_tasks
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies import valence_report
from cachemedic.studies.quantised_evaluation import quantised_readers, quantised_scores
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of
from cachemedic.studies.sweeps import by_condition, defenses_of, standard_config
from cachemedic.training.config import Objective, TrainConfig
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import load_or_train
from cachemedic.training.valence.quantiser import BITS

STEPS, VARIANT_STEPS, QUANTISER_STEPS = 150, 100, 80
FEW = 3  # seeds of the variants
OBJECTIVES: dict[str, Objective] = {"canonical": RepairObjective(), "valence": valence_report.VALENCE}
SEVERITIES = (0.5, 1.0)


def examples(run: Run) -> dict[str, int]:
    """Of each task, a seed."""
    return {"perplexity": 3, "sentiment": 3} if run.smoke else {"perplexity": 16, "sentiment": 16}


def sweep(run: Run, base: Base) -> TrainConfig:
    """What every condition varies."""
    given = run.parameters
    standard = standard_config(base, given["family"], given["seeds"], run.smoke, STEPS, "valence")
    return replace(standard, batch=min(standard.batch, 8))


def objectives(run: Run, base: Base) -> TrainConfig:
    """(a) The canonical and the valence objective, one stack."""
    return replace(sweep(run, base), objectives=tuple(OBJECTIVES.values()))


def variants(run: Run, base: Base) -> TrainConfig:
    """(b) to (d) The valence objective with one thing changed, one stack."""
    common, changed = sweep(run, base), tuple(valence_report.VARIANTS.values())
    return replace(common, seeds=common.seeds[:FEW], objectives=changed, steps=min(common.steps, VARIANT_STEPS))


def quantised(run: Run, base: Base) -> TrainConfig:
    """(e) What trains the quantiser: no other fault than its rounding."""
    common = sweep(run, base)
    steps, batch = min(common.steps, QUANTISER_STEPS), 2 if run.smoke else 4
    return replace(common, mixture=Mixture(clean_share=1.0), steps=steps, batch=batch, lr=1e-2)


def grid(
    run: Run, base: Base, readers: Mapping[str, Defense], part: str, few: bool = False, **chosen: Any
) -> pd.DataFrame:
    """Readers on both tasks, or with a `few` seeds on language modelling; `chosen` as for `run_grid`."""
    seeds, sizes = run.parameters["seeds"], examples(run)
    if few:
        seeds, sizes = seeds[:FEW], {"perplexity": sizes["perplexity"]}
    tasks = standard_tasks(base, "test", seeds, sizes)
    readers = {"none": NoDefense(), **readers}
    return run_grid(base, tasks, readers, run.partial / part, **{"severities": SEVERITIES, **chosen})


def scores(run: Run, base: Base, caches: Mapping[str, Any]) -> pd.DataFrame:
    """`quantised_scores` of caches of few bits."""
    sizes = {"perplexity": examples(run)["perplexity"]}
    task = standard_tasks(base, "test", run.parameters["seeds"], sizes)["perplexity"]
    return quantised_scores(base, task, clean_pass(base.model, task), dict(caches))


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)

    def trained(config: TrainConfig) -> RepairOperator:
        return load_or_train(base, config, run.trained, run.work, retrain=run.retrain or run.smoke)

    first, second = objectives(run, base), variants(run, base)
    grid_a = grid(run, base, defenses_of(base, by_condition(trained(first), list(OBJECTIVES))), "a")
    names = list(valence_report.VARIANTS)
    others = defenses_of(base, by_condition(trained(second), names))
    grid_b = grid(run, base, others, "b", few=True)

    repair, valence, plain = RepairObjective(), valence_report.VALENCE, quantised(run, base)
    kinds: dict[str, tuple[Objective, bool]] = {
        "learned steps": (repair, True),
        "learned steps + repair": (repair, False),
    }
    bits = BITS[-1:] if run.smoke else BITS
    caches = {"16 bits": (None, None), **quantised_readers(base, plain, bits, kinds, run)}
    kinds = {"valence": (valence, False), "valence, no decay": (replace(valence, lambda_reg=0), False)}
    caches |= quantised_readers(base, plain, BITS[-1:], kinds, run)
    rows = scores(run, base, caches)
    return {
        "valence_grid": grid_a,
        "valence_objectives": valence_report.against(grid_a, "canonical"),
        "valence_conditions": valence_report.against(grid_b, "valence"),
        "quantised_cache": rows,
        "quantised_cache_summary": valence_report.bits_table(rows),
        "valence_effective": valence_report.effective_sequences(base, second, names, 2 if run.smoke else 10),
    }
