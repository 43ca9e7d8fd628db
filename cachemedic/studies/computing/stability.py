"""Stability (notebook 10): does repair damp noise, or amplify it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from cachemedic.data.task_data import TaskData
from cachemedic.data.tasks import perplexity_task
from cachemedic.data.text import documentation
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import blind_defenses
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import calibration_of
from cachemedic.evaluation.stability import NOISE, amplification, sensitivity
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.computing import contraction
from cachemedic.studies.family_study import headline
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, standard_of
from cachemedic.studies.summaries import means_over_seeds
from cachemedic.studies.sweeps import train_sweep, trained
from cachemedic.training.config import TrainConfig

NO_DEFENCE = "no defence"
MEASURES = ("sensitivity", "distance")


def conditions(run: Run, base: Base) -> dict[str, TrainConfig]:
    """The operators of notebook 04, which trains them; of the valence objective, the one of it."""
    if run.parameters["objective"] == "canonical":
        return contraction.conditions(run, base)
    return {run.parameters["objective"]: standard_of(run, base, contraction.STEPS)}


def operator_name(run: Run) -> str:
    """What the operator of this run's family is called."""
    return f"operator {run.parameters['family']}"


def readers(
    run: Run, base: Base, swept: Mapping[str, RepairOperator], study: Mapping[str, RepairOperator]
) -> dict[str, Defense]:
    """What is compared: no defence, the best heuristic, operators `swept` over conditions, D and E of the `study`."""
    blind = blind_defenses(calibration_of(base))
    main = run.read_csv("main_results")
    heuristic = main[(main.base == run.parameters["base"]) & main.best_heuristic].reader.iloc[0]
    repaired = operator_name(run)
    shown = {contraction.DEFAULT: repaired, contraction.WITHOUT: f"{repaired}, no contraction term"}
    shown |= {run.parameters["objective"]: repaired}
    compared: dict[str, Defense] = {NO_DEFENCE: blind["none"], heuristic.replace("_", " "): blind[heuristic]}
    compared |= {label: swept[name].defense(base.model) for name, label in shown.items() if name in swept}
    return compared | {name: study[name].defense(base.model) for name in ("D", "E")}


def texts(run: Run, base: Base) -> TaskData:
    """What is read."""
    n = 2 if run.smoke else 6
    return perplexity_task(base.tokenizer, documentation("test"), run.parameters["seeds"], n, scored=8)


def moved(run: Run, base: Base, compared: Mapping[str, Defense], levels: Sequence[float] = NOISE) -> pd.DataFrame:
    """How far the logits move under noise of some `levels`."""
    task = texts(run, base)
    return sensitivity(base.model, task, clean_pass(base.model, task), compared, levels, draws=1 if run.smoke else 2)


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of `moved`, and the number of examples."""
    means = means_over_seeds(rows, ["reader", "noise"], MEASURES)
    means["n_examples"] = rows.groupby(["reader", "noise"], sort=False)["n_examples"].sum().to_numpy()
    return means


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    swept = train_sweep(base, conditions(run, base), run)
    study = headline(base, run.parameters["seeds"], run.smoke)
    found = trained(base, {name: study[name] for name in ("D", "E")}, run)
    compared = readers(run, base, swept, found)
    rows, task = moved(run, base, compared), texts(run, base)
    mapped = {name: compared[name] for name in (NO_DEFENCE, operator_name(run), "E")}
    maps = amplification(base.model, task, clean_pass(base.model, task), mapped)
    return {"stability_sensitivity": rows, "stability_curves": curves(rows), "stability_amplification": maps}
