"""A pretrained model (notebook 17): the main result on SmolLM2, and what the kind of text does to a repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import Reset, blind_defenses
from cachemedic.defenses.registry import DEFENSES
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.evaluation.experiments import TYPES, calibration_of, kept_frame, per_seed, standard_tasks
from cachemedic.evaluation.severity_calibration import calibrate_severities
from cachemedic.models.load import Base, load_base
from cachemedic.studies import pretrained
from cachemedic.studies.family_evaluation import bytes_per_token
from cachemedic.studies.main_study import best_blind
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import (
    advantage,
    in_order,
    means_over_seeds,
    recovery_by_severity,
    recovery_by_type,
    summary,
)

BASELINES = ("checksum_erase", "shadow_1bit", "shadow_2bit", "recompute")
EXAMPLES, REVIEWS = 40, 20  # windows and reviews of the main result, a seed
KIND_EXAMPLES, SEVERITY_WINDOWS, VALIDATION = 4, 32, 4  # windows: a seed and kind; in all; a seed
ASKED = ("none", "recompute", "D", "E")  # of reviews, with the best heuristic
ASKED_AT = (0.5, 1.0)
CALIBRATION = 16  # windows whose ranges clip
KIND_SEVERITY = 0.5
REFERENCES = ("E", "D")


def severities(run: Run, base: Base, source: TextSource) -> pd.DataFrame:
    """The severity map of a base, on the calibration split."""

    def calibrated() -> pd.DataFrame:
        documents = source.documents_of("calibration")
        count = 8 if run.smoke else SEVERITY_WINDOWS
        task = pretrained.language_task(base, documents, "calibration", [0], count)
        return calibrate_severities(base, task, clean_pass(base.model, task), TYPES)[1]

    return kept_frame(run.partial / "severities.csv", calibrated)


def readers_of(run: Run, base: Base, source: TextSource) -> tuple[dict[str, Defense], str]:
    """Every reader by name; and which is the best blind heuristic of the validation split."""
    seeds = run.parameters["seeds"]
    calibration = calibration_of(base, 4 if run.smoke else CALIBRATION, source)
    blind = blind_defenses(calibration)
    documents = source.documents_of("validation")
    task = pretrained.language_task(base, documents, "validation", seeds[:2], 2 if run.smoke else VALIDATION)
    best = best_blind(base, blind, {"perplexity": task}, run.partial / "validation")
    baselines = {name: DEFENSES[name](calibration) for name in BASELINES}
    repairs = pretrained.token_readers(base, source)
    return {"none": blind["none"], best: blind[best], **baselines, **repairs}, best


def main_grid(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense], best: str) -> pd.DataFrame:
    """Language modelling through all readers, and reviews through those that matter most."""
    seeds, size = run.parameters["seeds"], 16 if run.smoke else EXAMPLES
    words = pretrained.language_task(base, source.documents_of("test"), "test", seeds, size)
    reviews = standard_tasks(base, "test", seeds, {"sentiment": 8 if run.smoke else REVIEWS}, source)["sentiment"]
    asked = {name: readers[name] for name in (*ASKED, best)}
    grids = [
        pretrained.balanced_grid(base, words, readers, run.partial / "grid"),
        pretrained.balanced_grid(base, reviews, asked, run.partial / "grid", ASKED_AT),
    ]
    return pd.concat(grids, ignore_index=True)


def kinds(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """KL behind noise of one severity, by kind of text; "erased" is a cache of which nothing is read."""
    compared = {"none": readers["none"], "erased": Reset(), "shadow_2bit": readers["shadow_2bit"]}
    compared |= {name: readers[name] for name in ("D", "E, code alone", "E")}
    spec = CorruptionSpec("gaussian", KIND_SEVERITY, base=base.name, severity_map=base.severity_map)
    frames = []
    for kind, documents in pretrained.kinds_of_text(base, source).items():

        def scores(kind: str = kind, documents: tuple[str, ...] = tuple(documents)) -> pd.DataFrame:
            count = 1 if run.smoke else KIND_EXAMPLES
            task = pretrained.language_task(base, documents, "test", run.parameters["seeds"], count)
            rows = per_seed(evaluate(base.model, task, clean_pass(base.model, task), spec, compared), task.name, spec)
            return rows.assign(kind=kind)

        frames.append(kept_frame(run.partial / f"kind-{kind}.csv", scores))
    rows = pd.concat(frames, ignore_index=True)
    means = means_over_seeds(rows, ["kind", "reader"], ["nll_clean", "kl"])
    return in_order(in_order(means, "reader", compared), "kind", rows["kind"].unique())


def results(run: Run, source: TextSource) -> dict[str, pd.DataFrame]:
    """`source`: the text; what the parameters record of it are names and a digest."""
    base = load_base(run.parameters["base"], device=run.parameters["device"])
    rows = severities(run, base, source)
    base = replace(base, severity_map=SeverityMap(rows))
    readers, best = readers_of(run, base, source)
    grid = main_grid(run, base, source, readers, best)
    overall = summary(grid).merge(bytes_per_token(base, readers), on="reader")
    overall = in_order(overall, "reader", readers).assign(best_heuristic=lambda found: found["reader"] == best)
    compared = [advantage(grid, reference).assign(reference=reference) for reference in REFERENCES]
    return {
        "pretrained_severities": rows,
        "pretrained_grid": grid,
        "pretrained_results": overall,
        "pretrained_by_type": recovery_by_type(grid),
        "pretrained_by_severity": recovery_by_severity(grid),
        "pretrained_paired": pd.concat(compared, ignore_index=True),
        "pretrained_kinds": kinds(run, base, source, readers),
    }
