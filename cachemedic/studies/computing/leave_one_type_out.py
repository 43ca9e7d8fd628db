"""Leave one type out (notebook 07): does repair carry over to faults that training never saw?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import pandas as pd

from cachemedic.defenses.defense import Defense
from cachemedic.evaluation.experiments import TYPES
from cachemedic.models.load import Base
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, standard_of, text_grid, train
from cachemedic.studies.summaries import advantage, by_group, in_order, summary
from cachemedic.studies.sweeps import defenses_of, with_and_without_contraction
from cachemedic.training.config import TrainConfig

STEPS = 100
RANK = 4
SEEN = "all types"


def types_of(run: Run) -> tuple[str, ...]:
    """The types that are held out, one at a time."""
    return TYPES[:2] if run.smoke else TYPES


def standard(run: Run, base: Base) -> TrainConfig:
    """What the conditions vary."""
    return replace(standard_of(run, base, STEPS), rank=RANK)


def terms(run: Run, base: Base) -> list[str]:
    """With which contraction terms operators are trained: "contraction", "no contraction"."""
    return list(with_and_without_contraction(standard(run, base)))


def conditions(run: Run, base: Base) -> dict[str, TrainConfig]:
    """Operators by the type that their training lacks, or "all types", and by contraction term."""
    common = standard(run, base)
    mixtures = {SEEN: common.mixture} | {kind: common.mixture.without(kind) for kind in types_of(run)}
    by_term = with_and_without_contraction(common)
    return {
        f"{left_out}, {term}": replace(config, mixture=mixture)
        for (left_out, mixture), (term, config) in product(mixtures.items(), by_term.items())
    }


def grid(
    run: Run, base: Base, readers: Mapping[str, Defense], kind: str, severities: Sequence[float] | None = None
) -> pd.DataFrame:
    """One type, read through the operators that never saw it, and through those that did."""
    own = {f"{SEEN}, {term}": readers[f"{SEEN}, {term}"] for term in terms(run, base)}
    own |= {f"held out, {term}": readers[f"{kind}, {term}"] for term in terms(run, base)}
    rows = text_grid(run, base, own, 3 if run.smoke else 20, kind, types=(kind,), severities=severities)
    return rows.assign(held_out=kind)


def results(run: Run) -> dict[str, pd.DataFrame]:
    base, types = base_of(run), types_of(run)
    readers = defenses_of(base, train(run, base, conditions(run, base)))
    rows = pd.concat([grid(run, base, readers, kind) for kind in types], ignore_index=True)
    overall = by_group(rows, ["held_out"], summary)
    overall = in_order(overall[overall.reader != "none"], "held_out", types)
    gaps = []
    for term in terms(run, base):
        gap = by_group(rows, ["held_out"], partial(advantage, reference=f"{SEEN}, {term}"))
        gaps.append(gap[gap.reader == f"held out, {term}"])
    return {
        "leave_one_out_grid": rows,
        "leave_one_out_results": overall,
        "leave_one_out_gaps": pd.concat(gaps, ignore_index=True),
    }
