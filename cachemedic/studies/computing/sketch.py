"""The sketch (notebook 15): its bytes, its parts, and the error that is left in the cache."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from cachemedic.corruption.severity import shipped_map
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.types import CORRUPTIONS
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import TYPES, run_grid, standard_tasks
from cachemedic.evaluation.repair_quality import repair_quality
from cachemedic.models.load import Base
from cachemedic.studies.family_evaluation import OneSide, SketchSwapped, bytes_per_token, rate_distortion, scrubbers
from cachemedic.studies.family_study import ablations, headline, shares
from cachemedic.studies.run import Run
from cachemedic.studies.setting import bases_of, severities_of
from cachemedic.studies.summaries import means_over_seeds, summary
from cachemedic.token.layerwise.scrub import Scrubber

FEW = 3  # seeds of the smaller sketches and of the ablations
SMALL = "E, 1/64"  # what the ablations change
ABLATION_SEVERITIES = (0.1, 0.5)
MEASURES = ("rho", "rho_k", "rho_v", "score_error", "auroc")


def examples(run: Run) -> dict[str, int]:
    """Texts a seed."""
    return {"perplexity": 2 if run.smoke else 5}


def few(run: Run) -> list[int]:
    """The seeds of the smaller sketches and of the ablations."""
    return run.parameters["seeds"][:FEW]


def bytes_of(run: Run, base: Base, sketch: Scrubber) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Recovery by size of the sketch, and the rate-distortion curves of a base; `sketch` is E at its usual size."""
    smaller = scrubbers(base, shares(base, few(run), run.smoke), run, run.smoke)
    task = standard_tasks(base, "test", few(run), examples(run))
    own: dict[str, Defense] = {"none": NoDefense(), **smaller}
    grid = run_grid(base, task, own, run.partial / "shares", severities=severities_of(run))
    points = summary(grid).merge(bytes_per_token(base, own), on="reader")
    curves = rate_distortion(base, {"E": sketch, **smaller}, 4 if run.smoke else 24)
    return points.assign(base=base.name), curves.assign(base=base.name)


def ablation(run: Run, base: Base) -> pd.DataFrame:
    """E with one thing changed, one side of it, and the sketch of another request."""
    conditions = {SMALL: shares(base, few(run), run.smoke)[SMALL], **ablations(base, few(run), run.smoke)}
    changed = scrubbers(base, conditions, run, run.smoke)
    sound = changed[SMALL]
    sides = {"keys only": OneSide(sound, "k"), "values only": OneSide(sound, "v")}
    own: dict[str, Defense] = {
        "none": NoDefense(),
        **changed,
        **sides,
        "sketch of another request": SketchSwapped(sound),
    }
    task = standard_tasks(base, "test", few(run), examples(run))
    at = (0.5,) if run.smoke else ABLATION_SEVERITIES
    grid = run_grid(base, task, own, run.partial / "ablations", severities=at)
    return summary(grid).merge(bytes_per_token(base, own), on="reader")


def quality(run: Run, base: Base, readers: Mapping[str, Scrubber]) -> pd.DataFrame:
    """Error left in the cache at severity 0.5, and detection of damage where half of the positions are hit."""
    task = standard_tasks(base, "test", run.parameters["seeds"], examples(run))["perplexity"]
    clean = clean_pass(base.model, task)
    shape, calibrated, parts = clean.k.shape[1:4], base.severity_map or shipped_map(), []
    for kind in TYPES:
        limit = calibrated.reach(kind, base.name, shape)
        parameter, _ = calibrated.resolve(kind, min(0.5, limit), base.name, shape, CORRUPTIONS[kind].by_share)
        for hit in (1.0, 0.5):
            parameter = round(parameter) if kind == "contiguous_overwrite" else parameter  # positions
            spec = CorruptionSpec(kind, parameter=parameter, share=hit)
            rows = repair_quality(base.model, task, clean, spec, readers)
            parts.append(rows.assign(base=base.name, type=kind, hit=hit))
    return pd.concat(parts)


def results(run: Run) -> dict[str, pd.DataFrame]:
    bases, seeds = bases_of(run), run.parameters["seeds"]
    found = {name: scrubbers(base, headline(base, seeds, run.smoke), run, run.smoke) for name, base in bases.items()}
    measured = [bytes_of(run, base, found[name]["E"]) for name, base in bases.items()]
    whole = run.read_csv("family_results")
    points = pd.concat([whole[whole.task == "perplexity"], *(points for points, _ in measured)], ignore_index=True)
    left = pd.concat([quality(run, base, found[name]) for name, base in bases.items()], ignore_index=True)
    keys = ["base", "reader", "type", "seed"]
    half = left[left.hit == 0.5].set_index(keys).auroc
    left = left[left.hit == 1.0].drop(columns="auroc").join(half, on=keys)
    return {
        "sketch_pareto": points,
        "sketch_rate_distortion": pd.concat([curves for _, curves in measured], ignore_index=True),
        "sketch_ablations": ablation(run, bases[run.parameters["second"]]),
        "sketch_quality": means_over_seeds(left, keys[:-1], MEASURES),
    }
