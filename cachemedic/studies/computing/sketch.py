"""The code of E (notebook 15): its bytes, its parts, and the error that is left in the cache."""

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
from cachemedic.studies.family_evaluation import (
    CodeSwapped,
    OneSide,
    TokenByToken,
    bytes_per_token,
    code_alone,
    rate_distortion,
    token_repairs,
    without_trust,
)
from cachemedic.studies.family_study import SMALL, ablations, before_training, headline, shares
from cachemedic.studies.run import Run
from cachemedic.studies.setting import bases_of, severities_of
from cachemedic.studies.summaries import means_over_seeds, summary

FEW = 3  # seeds of codes of other lengths and of the ablations
ABLATED = f"E, 1/{1 / SMALL:.0f}"
ABLATION_SEVERITIES = (0.1, 0.5)
MEASURES = ("rho", "rho_k", "rho_v", "score_error")


def examples(run: Run) -> dict[str, int]:
    """Texts a seed."""
    return {"perplexity": 2 if run.smoke else 5}


def few(run: Run) -> list[int]:
    """The seeds of codes of other lengths and of the ablations."""
    return run.parameters["seeds"][:FEW]


def bytes_of(run: Run, base: Base) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Recovery by length of the code, and the rate-distortion curves of a base."""
    usual = {"E, 1/128": before_training(base, few(run), run.smoke)["E, untrained"]}
    found = token_repairs(base, {**usual, **shares(base, few(run), run.smoke)}, run)
    alone = {f"{name}, code alone": code_alone(repair) for name, repair in found.items()}
    task = standard_tasks(base, "test", few(run), examples(run))
    own: dict[str, Defense] = {"none": NoDefense(), **found, **alone}
    grid = run_grid(base, task, own, run.partial / "shares", severities=severities_of(run))
    points = summary(grid).merge(bytes_per_token(base, own), on="reader")
    curves = rate_distortion(base, found, 4 if run.smoke else 24)
    return points.assign(base=base.name), curves.assign(base=base.name)


def ablation(run: Run, base: Base) -> pd.DataFrame:
    """E with one thing changed, one side of it, and what was kept of another request."""
    conditions = {ABLATED: shares(base, few(run), run.smoke)[ABLATED], **ablations(base, few(run), run.smoke)}
    changed = token_repairs(base, conditions, run)
    whole = changed[ABLATED]
    own: dict[str, Defense] = {
        "none": NoDefense(),
        **changed,
        "no trust network": without_trust(whole),
        "token by token": TokenByToken(base.model, whole.operator),
        "code alone": code_alone(whole),
        "keys only": OneSide(whole, "k"),
        "values only": OneSide(whole, "v"),
        "code of another request": CodeSwapped(whole),
    }
    task = standard_tasks(base, "test", few(run), examples(run))
    at = (0.5,) if run.smoke else ABLATION_SEVERITIES
    grid = run_grid(base, task, own, run.partial / "ablations", severities=at)
    return summary(grid).merge(bytes_per_token(base, own), on="reader")


def quality(run: Run, base: Base, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """Error left in the cache at severity 0.5."""
    task = standard_tasks(base, "test", run.parameters["seeds"], examples(run))["perplexity"]
    clean = clean_pass(base.model, task)
    shape, calibrated, parts = clean.k.shape[1:4], base.severity_map or shipped_map(), []
    for kind in TYPES:
        limit = calibrated.reach(kind, base.name, shape)
        parameter, _ = calibrated.resolve(kind, min(0.5, limit), base.name, shape, CORRUPTIONS[kind].by_share)
        parameter = round(parameter) if kind == "contiguous_overwrite" else parameter  # positions
        spec = CorruptionSpec(kind, parameter=parameter)
        rows = repair_quality(base.model, task, clean, spec, readers)
        parts.append(rows.assign(base=base.name, type=kind))
    return pd.concat(parts)


def results(run: Run) -> dict[str, pd.DataFrame]:
    bases, seeds = bases_of(run), run.parameters["seeds"]
    measured = [bytes_of(run, base) for base in bases.values()]
    whole = run.read_csv("family_results")
    points = pd.concat([whole[whole.task == "perplexity"], *(points for points, _ in measured)], ignore_index=True)
    parts = []
    for base in bases.values():
        found = token_repairs(base, headline(base, seeds, run.smoke), run)
        parts.append(quality(run, base, {**found, "E, code alone": code_alone(found["E"])}))
    left = pd.concat(parts, ignore_index=True)
    return {
        "sketch_pareto": points,
        "sketch_rate_distortion": pd.concat([curves for _, curves in measured], ignore_index=True),
        "sketch_ablations": ablation(run, bases[run.parameters["second"]]),
        "sketch_quality": means_over_seeds(left, ["base", "reader", "type"], MEASURES),
    }
