"""The grid of the faults that really happen: every reader at every parameter of every fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from cachemedic.core.progress import tqdm
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.types import NONE
from cachemedic.data.task_data import TaskData
from cachemedic.defenses.clean_ranges import plausible
from cachemedic.defenses.defense import Around, CachedTokens, Defense
from cachemedic.evaluation import statistics as stats
from cachemedic.evaluation.decoding import CleanBank, clean_pass, decode_logits, tokens_of
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.evaluation.experiments import kept_frame
from cachemedic.models.load import Base


class Guarded(Around):
    """A defense that reads zero in place of what is not finite or beyond the range of fp16: one pass over the cache."""

    def read(self, damaged: CachedTokens, kept: object) -> CachedTokens:
        return self.inner.read(replace(damaged, k=plausible(damaged.k), v=plausible(damaged.v)), kept)


def stored_bank(base: Base, task: TaskData) -> CleanBank:
    """The clean pass of a task whose cache is stored in bf16, as servers do, with the logits over the stored cache."""
    clean = clean_pass(base.model, task)
    k, v = (x.bfloat16().to(x.dtype) for x in (clean.k, clean.v))
    return CleanBank(k, v, decode_logits(base.model, tokens_of(task, k, v), task))


def run_faults(
    base: Base,
    task: TaskData,
    readers: Mapping[str, Defense],
    faults: Mapping[str, Sequence[float]],
    folder: Path,
) -> pd.DataFrame:
    """Every reader at every parameter of `faults`, by name, and on the sound cache (type none).

    One row per type, parameter, reader and seed: nll, nll_clean, kl, means over the examples that decode to finite
    numbers; failed: the share of those that do not. Finished conditions are kept under `folder`.
    """
    specs = [CorruptionSpec(NONE)]
    specs += [CorruptionSpec(name, parameter=p) for name, parameters in faults.items() for p in parameters]
    bank: CleanBank | None = None
    frames = []
    for spec in tqdm(specs, desc=f"faults on {base.name}"):

        def scores(spec: CorruptionSpec = spec) -> pd.DataFrame:
            nonlocal bank
            bank = stored_bank(base, task) if bank is None else bank
            rows = evaluate(base.model, task, bank, spec, readers)
            rows["failed"] = ~np.isfinite(rows["nll"])
            rows.loc[rows["failed"], ["nll", "kl"]] = np.nan
            means = rows.groupby(["reader", "seed"], sort=False)[["nll", "nll_clean", "kl", "failed"]].mean()
            means["n_examples"] = rows.groupby(["reader", "seed"], sort=False).size()
            return means.reset_index().assign(type=spec.type, parameter=spec.parameter or 0.0)

        frames.append(kept_frame(folder / f"{Path(base.name).name}-{spec.type}-{spec.parameter}.csv", scores))
    return pd.concat(frames, ignore_index=True)


def fault_summary(grid: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% t interval over seeds of kl, failed examples, and the excess NLL, by type, parameter and reader."""
    rows = []
    for (kind, parameter, reader), part in grid.groupby(["type", "parameter", "reader"], sort=False):
        row = {"type": kind, "parameter": parameter, "reader": reader, "failed": part["failed"].mean()}
        for name, values in (("kl", part["kl"]), ("excess_nll", part["nll"] - part["nll_clean"])):
            finite = values.dropna()
            interval = stats.t_interval(finite) if len(finite) else stats.Interval(np.nan, np.nan, np.nan)
            row |= interval.columns(name)
        rows.append(row | {"n_seeds": part["seed"].nunique(), "n_examples": int(part["n_examples"].sum())})
    return pd.DataFrame(rows)
