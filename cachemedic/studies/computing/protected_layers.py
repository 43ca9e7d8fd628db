"""Protected layers (notebook 06): which layers should an operator sit on?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import pandas as pd

from cachemedic.defenses.defense import Defense
from cachemedic.evaluation.experiments import TYPES
from cachemedic.models.load import Base
from cachemedic.studies.run import Run
from cachemedic.studies.setting import base_of, standard_of, text_grid, train
from cachemedic.studies.summaries import by_group, in_order, summary
from cachemedic.studies.sweeps import PLACES, block, defenses_of
from cachemedic.training.config import TrainConfig

SIZES = (2, 4, 8)
STEPS = 60
SEVERITIES = (0.25, 1.0)


def blocks(run: Run, base: Base) -> dict[str, tuple[int, ...]]:
    """The layers of each block, by its place and size: "mid 4"."""
    depth, sizes = base.config.num_hidden_layers, SIZES[:2] if run.smoke else SIZES
    return {f"{place} {size}": block(depth, size, place) for place, size in product(PLACES, sizes)}


def conditions(run: Run, base: Base) -> dict[str, TrainConfig]:
    """An operator for each block and for where faults are: "protected mid 4", "all mid 4"."""
    standard = standard_of(run, base, STEPS)
    return {
        f"{hit} {name}": replace(standard, layers=layers, corrupted_layers=hit)
        for hit, (name, layers) in product(("protected", "all"), blocks(run, base).items())
    }


def protected_grid(
    run: Run,
    base: Base,
    name: str,
    reader: Defense,
    types: Sequence[str] = TYPES,
    severities: Sequence[float] = SEVERITIES,
) -> pd.DataFrame:
    """Faults on the layers of block `name` only; each block meets faults of its own, and no defence is measured too."""
    at, examples = ((0.5,), 2) if run.smoke else (severities, 12)
    rows = text_grid(run, base, {name: reader}, examples, name, blocks(run, base)[name], types, at)
    return rows.assign(hit="protected", layers=name)


def everywhere_grid(run: Run, base: Base, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """Faults on all layers: all blocks read the same caches."""
    severities, examples = ((0.5,), 2) if run.smoke else (SEVERITIES, 12)
    rows = text_grid(run, base, readers, examples, "all", severities=severities)
    return rows.assign(hit="all", layers="all")


def results(run: Run) -> dict[str, pd.DataFrame]:
    base = base_of(run)
    names = blocks(run, base)
    readers = defenses_of(base, train(run, base, conditions(run, base)))
    grids = [everywhere_grid(run, base, {name: readers[f"all {name}"] for name in names})]
    grids += [protected_grid(run, base, name, readers[f"protected {name}"]) for name in names]
    grid = pd.concat(grids, ignore_index=True)
    overall = by_group(grid, ["hit", "layers"], summary).drop(columns="layers")
    overall = in_order(overall[overall.reader != "none"], "reader", names)
    overall[["place", "size"]] = overall.pop("reader").str.split(expand=True)
    return {"protected_layers_grid": grid, "protected_layers_results": overall.astype({"size": int})}
