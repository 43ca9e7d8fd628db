"""The grid of an experiment: every reader on every task, type and severity, and its summary over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cachemedic import stats
from cachemedic.corruption import MIXTURE_WEIGHTS
from cachemedic.corruption_spec import Axis, CorruptionSpec
from cachemedic.corruption_types import NONE
from cachemedic.decoding import CleanBank, clean_pass
from cachemedic.evaluate import Reader, evaluate
from cachemedic.models import Base
from cachemedic.severity import GRID, reach
from cachemedic.task_data import TaskData
from cachemedic.tasks import needle_task, perplexity_task, sentiment_task
from cachemedic.text import documentation, write_atomically

TYPES = tuple(MIXTURE_WEIGHTS)
EXAMPLES = {"perplexity": 24, "sentiment": 32, "needle": 15}  # per seed, in the paper profile
SCORES = {"perplexity": "1 / perplexity", "sentiment": "accuracy", "needle": "exact match"}
SPLIT_OFFSET = {"test": 0, "validation": 1000, "calibration": 2000}
ID_COLUMNS = ["task", "type", "severity", "reader", "seed"]


def standard_tasks(
    base: Base, split: str, seeds: Sequence[int], examples: Mapping[str, int] = EXAMPLES
) -> dict[str, TaskData]:
    """The three tasks on one documentation split, `examples` of each per seed; a task of no examples is left out."""
    documents = documentation(split)
    # the generated parts of validation and calibration examples come from generators that the test split never uses
    drawn = [seed + SPLIT_OFFSET[split] for seed in seeds]
    tasks = {}
    if n := examples.get("perplexity"):
        tasks["perplexity"] = perplexity_task(base.tokenizer, documents, drawn, n)
    if n := examples.get("sentiment"):
        tasks["sentiment"] = sentiment_task(base.tokenizer, drawn, n, split=split)
    if n := examples.get("needle"):
        tasks["needle"] = needle_task(base.tokenizer, documents, drawn, n)
    return tasks


def run_grid(
    base: Base,
    tasks: Mapping[str, TaskData],
    readers: Mapping[str, Reader],
    folder: Path | None,
    layers: Axis = "all",
    types: Sequence[str] = TYPES,
    severities: Sequence[float] = GRID,
) -> pd.DataFrame:
    """Every reader on every task, type and severity (0 and `severities`, as far as a type reaches).

    `layers` says which layers the faults hit. One row per `ID_COLUMNS` with columns parameter, share, nll, nll_clean,
    kl, accuracy (NaN where not graded) and n_examples. Finished conditions are kept under `folder`, from where an
    interrupted grid goes on (None: not kept).
    """
    shape = (base.model.config.num_hidden_layers, _kv_heads(base), 0)
    conditions = [(name, CorruptionSpec(NONE)) for name in tasks]
    for name in tasks:
        for corruption in types:
            limit = reach(corruption, base.name, shape)
            for severity in sorted({min(s, limit) for s in severities}):
                conditions.append((name, CorruptionSpec(corruption, severity, layers=layers, base=base.name)))
    banks: dict[str, CleanBank] = {}
    frames = []
    for name, spec in tqdm(conditions, desc=f"grid on {base.name}"):
        label = f"{Path(base.name).name}-{name}-{spec.type}-{spec.severity}.csv"
        path = None if folder is None else folder / label
        if path is not None and path.exists():
            frames.append(pd.read_csv(path))
            continue
        if name not in banks:
            banks = {name: clean_pass(base.model, tasks[name])}  # one at a time: a bank can be large
        frame = per_seed(evaluate(base.model, tasks[name], banks[name], spec, readers), name, spec)
        if path is not None:
            write_atomically(path, frame.to_csv(index=False).encode())
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _kv_heads(base: Base) -> int:
    config = base.model.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def per_seed(scores: pd.DataFrame, task: str, spec: CorruptionSpec) -> pd.DataFrame:
    """Means over the examples of each seed, and the condition."""
    scores = scores.astype({name: float for name in ("nll", "nll_clean", "kl", "correct")})  # sums in double precision
    grouped = scores.groupby(["reader", "seed"], sort=False)
    means = grouped.agg(
        parameter=("parameter", "mean"), share=("share", "mean"), nll=("nll", "mean"), nll_clean=("nll_clean", "mean"),
        kl=("kl", "mean"), accuracy=("correct", "mean"), n_examples=("nll", "size"),
    )  # fmt: skip
    means = means.reset_index()
    means.insert(0, "task", task)
    means.insert(1, "type", spec.type)
    means.insert(2, "severity", spec.severity or 0.0)
    return means


def score(rows: pd.DataFrame) -> pd.Series:
    """The score of each row, higher is better: 1 / perplexity for the language model, else the accuracy."""
    return rows["accuracy"].where(rows["task"] != "perplexity", np.exp(-rows["nll"]))


def robustness(grid: pd.DataFrame) -> pd.DataFrame:
    """Robustness AUC of every task, type, reader and seed: columns task, type, reader, seed, auc, reached."""
    grid = grid.assign(score=score(grid))
    clean = grid[grid["type"] == NONE].set_index(["task", "reader", "seed"])["score"]
    rows = []
    for (task, kind, reader, seed), curve in grid[grid["type"] != NONE].groupby(["task", "type", "reader", "seed"]):
        curve = curve.sort_values("severity")
        severities = [0.0, *curve["severity"]]
        auc = stats.robustness_auc(severities, [clean[task, reader, seed], *curve["score"]])
        rows.append((task, kind, reader, seed, auc, severities[-1]))
    return pd.DataFrame(rows, columns=["task", "type", "reader", "seed", "auc", "reached"])


def intervals(grid: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% t interval over seeds of score, NLL and KL for every task, type, severity and reader."""
    grid = grid.assign(score=score(grid))
    rows = []
    for key, group in grid.groupby(ID_COLUMNS[:-1], sort=False):
        row = dict(zip(ID_COLUMNS[:-1], key, strict=True))
        for name in ("score", "nll", "kl"):
            interval = stats.t_interval(group[name])
            row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
        row |= {"parameter": group["parameter"].mean(), "share": group["share"].mean()}
        row |= {"n_seeds": group["seed"].nunique(), "n_examples": int(group["n_examples"].sum())}
        rows.append(row)
    return pd.DataFrame(rows)


def summary(grid: pd.DataFrame) -> pd.DataFrame:
    """One row per task and reader: robustness AUC (mean over types) and its paired gain over no defence, recovery of the
    lost NLL over all types and severities, and clean regression in percent of perplexity; 95% intervals over seeds.
    """
    auc = robustness(grid).groupby(["task", "reader", "seed"])["auc"].mean().unstack("seed")
    hit, clean = grid[grid["type"] != NONE], grid[grid["type"] == NONE]
    means = hit.groupby(["task", "reader", "seed"])[["nll", "nll_clean", "kl"]].mean()
    rows = []
    for task, reader in auc.index:
        undefended = means.loc[task, "none"]
        repaired = means.loc[task, reader]
        gain = stats.paired_interval(auc.loc[task, reader], auc.loc[task, "none"])
        recovered = stats.ratio_interval(
            undefended["nll"] - repaired["nll"], undefended["nll"] - undefended["nll_clean"]
        )
        spared = stats.ratio_interval(undefended["kl"] - repaired["kl"], undefended["kl"])
        at_rest = clean[(clean["task"] == task) & (clean["reader"] == reader)]
        regression = stats.t_interval(100 * np.expm1(at_rest["nll"] - at_rest["nll_clean"]))
        own = stats.t_interval(auc.loc[task, reader])
        row = {"task": task, "reader": reader, "n_seeds": auc.shape[1]}
        named = {"auc": own, "auc_gain": gain, "recovery": recovered, "kl_recovery": spared, "clean_regression": regression}
        for name, interval in named.items():
            row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows)


def recovery_by_type(grid: pd.DataFrame) -> pd.DataFrame:
    """Recovery of the lost NLL of every task, type and reader, a ratio of means over severities, with intervals."""
    means = grid[grid["type"] != NONE].groupby(["task", "type", "reader", "seed"])[["nll", "nll_clean"]].mean()
    rows = []
    for task, kind, reader in means.index.droplevel("seed").unique():
        undefended, repaired = means.loc[task, kind, "none"], means.loc[task, kind, reader]
        interval = stats.ratio_interval(undefended["nll"] - repaired["nll"], undefended["nll"] - undefended["nll_clean"])
        rows.append((task, kind, reader, interval.estimate, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["task", "type", "reader", "recovery", "recovery_low", "recovery_high"])
