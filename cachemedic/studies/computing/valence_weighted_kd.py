"""Valence-weighted distillation (notebook 12)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from cachemedic.corruption.severity import shipped_map
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.tasks import mood_task
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import TYPES, kept_frame
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.studies import valence_report
from cachemedic.studies.measured_valence import measure_valence
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of
from cachemedic.studies.sweeps import by_condition, defenses_of, standard_config, trained
from cachemedic.training.config import Objective, TrainConfig
from cachemedic.training.valence.head import shipped_valence

FAMILIES = ("D", "E", "A")
STEPS = {"A": 100, "D": 40, "E": 40}
SEEDS, CACHED = 3, 64  # of the runs; tokens that are cached where valence is measured
SAMPLES, PREFIX, BATCH = 256, 32, 8  # texts a seed, cached tokens of each, and sequences of a step
HORIZON = 10  # simulated tokens
SEVERITY = 0.5  # on validation text the undefended valence is off by .16 there, and by .12 at half of it


def families(run: Run) -> list[str]:
    """That of the run, which is trained under all conditions, and the others."""
    own = run.parameters["family"]
    return [own, *(family for family in FAMILIES if family != own)]


def objectives(run: Run, base: Base, family: str) -> dict[str, Objective]:
    """The conditions of a family, by name."""
    canonical = standard_config(base, family, [0], run.smoke).objectives[0]
    return valence_report.conditions(canonical, few=family != run.parameters["family"])


def stack(run: Run, base: Base, family: str) -> TrainConfig:
    """All conditions of a family, one stack: the same texts, faults and draws."""
    seeds = run.parameters["seeds"][:SEEDS]
    standard = standard_config(base, family, seeds, run.smoke, objective="valence")
    samples, batch = (4, 2) if run.smoke else (SAMPLES, BATCH)
    return replace(
        standard,
        objectives=tuple(objectives(run, base, family).values()),
        bank=replace(standard.bank, samples=samples * len(seeds), prefix=PREFIX),
        steps=2 if run.smoke else STEPS.get(family, STEPS["A"]),
        batch=batch,
    )


def grid(run: Run, base: Base, readers: Mapping[str, Defense], part: str, types: Sequence[str] = TYPES) -> pd.DataFrame:
    """`valence_report.per_seed` of some readers on unseen texts of one mood: sound, and under each of `types`."""
    task = mood_task(base.tokenizer, run.parameters["seeds"][:SEEDS], 2 if run.smoke else 6, prefix=CACHED)
    clean, valence, readers = clean_pass(base.model, task), shipped_valence(base), {"none": NoDefense(), **readers}
    calibrated, shape = base.severity_map or shipped_map(), ModelShape.of(base.model.config)
    specs = [CorruptionSpec("none")]
    for kind in types:
        severity = min(SEVERITY, calibrated.reach(kind, base.name, (shape.num_layers, shape.num_kv_heads, 0)))
        specs.append(CorruptionSpec(kind, severity, base=base.name, severity_map=calibrated))

    def measured(spec: CorruptionSpec) -> pd.DataFrame:
        return valence_report.per_seed(measure_valence(base.model, task, clean, spec, readers, valence, HORIZON))

    parts = [kept_frame(run.partial / f"{part}-{spec.type}.csv", partial(measured, spec)) for spec in specs]
    return pd.concat(parts, ignore_index=True)


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    stacks = {family: stack(run, base, family) for family in families(run)}
    operators, parts = trained(base, stacks, run, retrain=run.smoke), []
    for family in families(run):
        named = objectives(run, base, family)
        rows = grid(run, base, defenses_of(base, by_condition(operators[family], list(named))), family)
        parts.append(rows.assign(family=family))
    measured = pd.concat(parts, ignore_index=True)
    own = families(run)[0]
    quickest = stack(run, base, "A")
    effective = valence_report.effective_sequences(base, quickest, objectives(run, base, own), 2 if run.smoke else 10)
    overall = valence_report.summary(measured)
    overall["effective"] = overall["reader"].map(effective)
    return {"valence_measured": measured, "valence_conditions": overall.assign(batch=quickest.batch)}
