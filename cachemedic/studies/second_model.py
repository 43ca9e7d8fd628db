"""The main result on any base and any text: severity map, readers and tasks of notebook 13."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from cachemedic.corruption.severity import shipped_map
from cachemedic.data.task_data import TaskData
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import blind_defenses
from cachemedic.evaluation import severity_calibration
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import calibration_of, standard_tasks
from cachemedic.models.load import EMBEDDED, Base
from cachemedic.studies.main_study import best_blind
from cachemedic.studies.run import Run
from cachemedic.studies.sweeps import standard_config
from cachemedic.training.config import TrainConfig

MAIN_EXAMPLES = {"perplexity": 10, "sentiment": 16, "needle": 5}  # per seed
SMOKE_EXAMPLES = {"perplexity": 2, "sentiment": 2, "needle": 2}
CALIBRATION = 64  # windows that ranges of clean caches are measured on
SEVERITY_WINDOWS = 96  # windows that severities are calibrated on


def severity_map(base: Base, source: TextSource, smoke: bool = False) -> pd.DataFrame:
    """The map from severities to parameters for a base on a text: the one that ships, or one that is calibrated now."""
    shipped = shipped_map().rows
    own = shipped[shipped["base"] == base.name]
    if len(own) and not source:
        return own
    examples = {"perplexity": SEVERITY_WINDOWS // 4 if smoke else SEVERITY_WINDOWS}
    task = standard_tasks(base, "calibration", [0], examples, source)["perplexity"]
    return severity_calibration.calibrate_severities(base, task, clean_pass(base.model, task))[1]


def main_tasks(base: Base, source: TextSource, split: str, seeds: Sequence[int], smoke: bool) -> dict[str, TaskData]:
    """Language modelling and sentiment, and needle retrieval if the base is an embedded one, which learned it."""
    examples = SMOKE_EXAMPLES if smoke else MAIN_EXAMPLES
    if split == "validation":
        examples = {name: max(2, n // 3) for name, n in examples.items()}
    known = {name: n for name, n in examples.items() if name != "needle" or base.name in EMBEDDED}
    return standard_tasks(base, split, seeds, known, source)


def blind_readers(base: Base, source: TextSource, seeds: Sequence[int], run: Run) -> dict[str, Defense]:
    """No defence ("none"), and the blind heuristic of the highest mean AUC on the validation split, by its own name."""
    blind = blind_defenses(calibration_of(base, 8 if run.smoke else CALIBRATION, source))
    validation = main_tasks(base, source, "validation", seeds[:2], run.smoke)
    best = best_blind(base, blind, validation, run.partial / "validation")
    return {"none": blind["none"], best: blind[best]}


def on_text(config: TrainConfig, source: TextSource) -> TrainConfig:
    """`config` with its bank, and the statistics of D and E, on another text; on the embedded one as it is."""
    return replace(config, bank=replace(config.bank, source=source))


def main_configs(base: Base, source: TextSource, seeds: Sequence[int], smoke: bool) -> dict[str, TrainConfig]:
    """How A, D and E (at 1/128 of the bytes of a bf16 cache) are trained: as in notebooks 03 and 08."""
    return {family: on_text(standard_config(base, family, seeds, smoke), source) for family in ("A", "D", "E")}
