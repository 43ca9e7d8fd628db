"""Sweeps on operators that respond (notebook 21): contraction, rank, target and place for A without its term, D and E.

Every family has a standard condition, from which the others differ in one thing. That of A has no contraction term;
that of D and E is how they ship. The condition "fitted only" of D and E is their trust network as it is fitted to known
faults, before the objective: it says what the objective adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pandas as pd

from cachemedic.defenses.defense import Defense
from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.family_study import token_aware_config, untrained
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, bases_of, text_grid, train
from cachemedic.studies.summaries import advantage, by_group, summary
from cachemedic.studies.sweeps import PLACES, block, defenses_of, standard_config
from cachemedic.training.config import TrainConfig
from cachemedic.training.objective import RepairObjective

FAMILIES = ("A", "D", "E")
STANDARD, FITTED = "standard", "fitted only"
STEPS = {"A": 200, "D": 60, "E": 60}
PLACE_STEPS = 100  # at most
# Weight and threshold of the contraction term, beside those of the standard condition.
OF_FOLDED = ((0.1, 0.95), (0.5, 0.8), (0.5, 0.9), (0.5, 0.95), (1.0, 0.95))
OF_STORED = ((0.0, 0.0), (0.1, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.8), (1.0, 0.8))
TERMS = {"A": OF_FOLDED, "D": OF_STORED, "E": OF_STORED}
RANKS = (4, 16)  # beside 8
TARGETS = ("K", "V")  # beside both
SIZES = (2, 4, 8)
MILD = 0.1
SEVERITIES, PLACE_SEVERITIES = (MILD, 0.5), (0.5,)
EXAMPLES = 8  # a seed


def standard(run: Run, base: Base, family: str) -> TrainConfig:
    """The condition of a family from which the others differ."""
    seeds = run.parameters["seeds"]
    if family == "A":
        config = standard_config(base, family, seeds, run.smoke, STEPS[family])
        return replace(config, objectives=(RepairObjective(lambda_contr=0.0),))
    config = token_aware_config(base, family, seeds, run.smoke)
    return replace(config, steps=min(config.steps, STEPS[family]))


def contraction_conditions(run: Run, base: Base, family: str) -> dict[str, TrainConfig]:
    """The standard condition, and those with other contraction terms."""
    common = standard(run, base, family)
    swept = TERMS[family][:1] if run.smoke else TERMS[family]
    terms = {f"lambda {w:g}, alpha {a:g}": RepairObjective(lambda_contr=w, alpha_contr=a) for w, a in swept}
    return {STANDARD: common} | {name: replace(common, objectives=(term,)) for name, term in terms.items()}


def size_conditions(run: Run, base: Base, family: str) -> dict[str, TrainConfig]:
    """Other ranks and targets, and of D and E what they are before the objective."""
    common = standard(run, base, family)
    ranks = {f"rank {rank}": replace(common, rank=rank) for rank in (RANKS[:1] if run.smoke else RANKS)}
    targets = TARGETS[:1] if run.smoke else TARGETS
    fitted = {} if family == "A" else {FITTED: untrained(common)}
    return fitted | ranks | {f"{target} only": replace(common, apply_to=target) for target in targets}


def blocks(run: Run, base: Base) -> dict[str, tuple[int, ...]]:
    """The layers of each block, by its place and size: "mid 4"."""
    depth = base.config.num_hidden_layers
    chosen = (PLACES[:1], SIZES[:1]) if run.smoke else (PLACES, SIZES)
    return {f"{place} {size}": block(depth, size, place) for place, size in product(*chosen)}


def place_conditions(run: Run, base: Base, family: str) -> dict[str, TrainConfig]:
    """An operator for each block, which alone is hit."""
    common = standard(run, base, family)
    common = replace(common, steps=min(common.steps, PLACE_STEPS))
    return {
        name: replace(common, layers=layers, corrupted_layers="protected") for name, layers in blocks(run, base).items()
    }


def readers(run: Run, base: Base) -> dict[str, Defense]:
    """The operators of all families and conditions but places: "E, rank 4"."""
    found: dict[str, RepairOperator] = {}
    for family in FAMILIES:
        own = contraction_conditions(run, base, family) | size_conditions(run, base, family)
        found |= {f"{family}, {name}": operator for name, operator in train(run, base, own).items()}
    return defenses_of(base, found)


def grid(run: Run, base: Base, compared: Mapping[str, Defense], **chosen: Any) -> pd.DataFrame:
    """Readers on every type and severity, or on those `chosen` as for `text_grid`; all layers are hit."""
    examples, severities = (2, (0.5,)) if run.smoke else (EXAMPLES, SEVERITIES)
    rows = text_grid(run, base, compared, examples, base.name, **{"severities": severities, **chosen})
    return rows.assign(base=base.name)


def place_grid(run: Run, base: Base, name: str, compared: Mapping[str, Defense], **chosen: Any) -> pd.DataFrame:
    """Readers of faults on the layers of block `name` only."""
    examples, severities = (2, (0.5,)) if run.smoke else (EXAMPLES, PLACE_SEVERITIES)
    layers = blocks(run, base)[name]
    rows = text_grid(run, base, compared, examples, name, layers, **{"severities": severities, **chosen})
    return rows.assign(block=name)


def compared_with_standard(rows: pd.DataFrame) -> pd.DataFrame:
    """`summary` of the grid of a base, with the KL spared of mild faults and the paired advantage over the standard."""
    overall = summary(rows)
    mild = summary(rows[rows.severity <= MILD]) if (rows.severity == MILD).any() else overall
    columns = ["kl_recovery", "kl_recovery_low", "kl_recovery_high"]
    overall = overall.merge(mild[["reader", *columns]].rename(columns=lambda c: c.replace("kl_", "mild_")), on="reader")
    gains = []
    for reader in overall.reader[overall.reader != "none"]:
        family, condition = reader.split(", ", 1)
        against = f"{family}, {STANDARD}"
        gain = advantage(rows[rows.reader.isin({"none", reader, against})], against)
        gains.append(gain[gain.reader == reader].assign(family=family, condition=condition))
    return overall.merge(pd.concat(gains).drop(columns=["task", "n_seeds"]), on="reader")


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    bases = [base] if run.smoke else list(bases_of(run).values())
    rows = pd.concat([grid(run, base, readers(run, base)) for base in bases], ignore_index=True)
    placed = {family: defenses_of(base, train(run, base, place_conditions(run, base, family))) for family in FAMILIES}
    parts = [
        place_grid(run, base, name, {family: own[name] for family, own in placed.items()}) for name in blocks(run, base)
    ]
    places = pd.concat(parts, ignore_index=True)
    by_place = by_group(places, ["block"], summary)
    by_place = by_place[by_place.reader != "none"].reset_index(drop=True)
    by_place[["place", "size"]] = by_place.pop("block").str.split(expand=True)
    return {
        "responding_grid": rows,
        "responding_results": by_group(rows, ["base"], compared_with_standard),
        "responding_places_grid": places,
        "responding_places": by_place.astype({"size": int}),
    }
