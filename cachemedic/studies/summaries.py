"""Summaries of a grid over seeds: scores, robustness, recovery, clean cost, each with its 95% interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from cachemedic.evaluation import statistics as stats

NONE = "none"  # the type of the rows of a clean cache, and the reader without a defence
CONDITION = ["task", "type", "severity", "reader"]  # with the seed, these columns name a row of a grid
SCORES = {"perplexity": "1 / perplexity", "sentiment": "accuracy", "needle": "exact match"}


def score(rows: pd.DataFrame) -> pd.Series:
    """The score of each row, higher is better: 1 / perplexity for the language model, else the accuracy."""
    return rows["accuracy"].where(rows["task"] != "perplexity", np.exp(-rows["nll"]))


def types_of(rows: pd.DataFrame) -> list[str]:
    """The corruption types of some rows, in their order, without that of the clean cache."""
    return [kind for kind in rows["type"].unique() if kind != NONE]


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
    for key, group in grid.groupby(CONDITION, sort=False):
        row = dict(zip(CONDITION, key, strict=True))
        for name in ("score", "nll", "kl"):
            interval = stats.t_interval(group[name])
            row |= interval.columns(name)
        row |= {"parameter": group["parameter"].mean(), "share": group["share"].mean()}
        row |= {"n_seeds": group["seed"].nunique(), "n_examples": int(group["n_examples"].sum())}
        rows.append(row)
    return pd.DataFrame(rows)


def summary(grid: pd.DataFrame) -> pd.DataFrame:
    """One row per task and reader, means over types and severities with 95% intervals over seeds.

    auc: robustness; auc_gain: its paired gain over no defence; recovery and kl_recovery: the shares of the lost NLL and
    of the KL that are undone; clean_regression: rise of the perplexity on a clean cache, in percent.
    """
    auc = robustness(grid).groupby(["task", "reader", "seed"])["auc"].mean().unstack("seed")
    hit, clean = grid[grid["type"] != NONE], grid[grid["type"] == NONE]
    means = hit.groupby(["task", "reader", "seed"])[["nll", "nll_clean", "kl"]].mean()
    rows = []
    for task, reader in auc.index:
        undefended = means.loc[task, "none"]
        repaired = means.loc[task, reader]
        gain = stats.paired_interval(auc.loc[task, reader], auc.loc[task, "none"])
        lost = undefended["nll"] - undefended["nll_clean"]
        recovered = stats.ratio_interval(undefended["nll"] - repaired["nll"], lost)
        spared = stats.ratio_interval(undefended["kl"] - repaired["kl"], undefended["kl"])
        at_rest = clean[(clean["task"] == task) & (clean["reader"] == reader)]
        regression = stats.t_interval(100 * np.expm1(at_rest["nll"] - at_rest["nll_clean"]))
        row = {"task": task, "reader": reader, "n_seeds": auc.shape[1], "n_examples": int(at_rest["n_examples"].sum())}
        named = {"auc": stats.t_interval(auc.loc[task, reader]), "auc_gain": gain}
        named |= {"recovery": recovered, "kl_recovery": spared, "clean_regression": regression}
        for name, interval in named.items():
            row |= interval.columns(name)
        rows.append(row)
    return pd.DataFrame(rows)


def recovery_by_type(grid: pd.DataFrame) -> pd.DataFrame:
    """Recovery of the lost NLL of every task, type and reader, a ratio of means over severities, with intervals."""
    means = grid[grid["type"] != NONE].groupby(["task", "type", "reader", "seed"])[["nll", "nll_clean"]].mean()
    rows = []
    for task, kind, reader in means.index.droplevel("seed").unique():
        undefended, repaired = means.loc[task, kind, "none"], means.loc[task, kind, reader]
        lost = undefended["nll"] - undefended["nll_clean"]
        interval = _share_of(undefended["nll"] - repaired["nll"], lost)
        rows.append((task, kind, reader, interval.estimate, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["task", "type", "reader", "recovery", "recovery_low", "recovery_high"])


def _share_of(undone: pd.Series, lost: pd.Series) -> stats.Interval:
    """The ratio of means of what was undone to what was lost; NaN where a fault did no damage at all."""
    if (lost == 0).all():
        return stats.Interval(*[float("nan")] * 3)
    return stats.ratio_interval(undone, lost)


def recovery_by_severity(grid: pd.DataFrame) -> pd.DataFrame:
    """Recovery of the lost NLL and of the KL of every task, type, severity and reader, ratios of means over seeds."""
    rows = []
    hit = grid[grid["type"] != NONE]
    for (task, kind, severity), part in hit.groupby(["task", "type", "severity"], sort=False):
        by_reader = {
            name: rows_of.set_index("seed").sort_index() for name, rows_of in part.groupby("reader", sort=False)
        }
        undefended = by_reader["none"]
        for reader, own in by_reader.items():
            lost = undefended["nll"] - undefended["nll_clean"]
            recovered = _share_of(undefended["nll"] - own["nll"], lost)
            spared = _share_of(undefended["kl"] - own["kl"], undefended["kl"])
            row = {"task": task, "type": kind, "severity": severity, "reader": reader}
            for name, interval in (("recovery", recovered), ("kl_recovery", spared)):
                row |= interval.columns(name)
            rows.append(row | {"n_seeds": len(own), "n_examples": int(own["n_examples"].sum())})
    return pd.DataFrame(rows)


Summarise = Callable[[pd.DataFrame], pd.DataFrame]


def by_group(grid: pd.DataFrame, keys: Sequence[str], summarise: Summarise) -> pd.DataFrame:
    """`summarise` of every group of rows that agree in `keys`, which come first in the result."""
    frames = []
    for values, part in grid.groupby(list(keys), sort=False):
        frame = summarise(part)
        for place, (key, value) in enumerate(zip(keys, values, strict=True)):
            frame.insert(place, key, value)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def in_order(rows: pd.DataFrame, column: str, names: Iterable[str]) -> pd.DataFrame:
    """`rows` sorted by the place of their `column` in `names`; equal ones stay in their order."""
    places = {name: place for place, name in enumerate(names)}
    return rows.sort_values(column, key=lambda x: x.map(places), kind="stable", ignore_index=True)


def advantage(grid: pd.DataFrame, reference: str) -> pd.DataFrame:
    """What every reader undoes more than the reader `reference` does, as shares of the damage without a defence.

    Columns task, reader, nll_advantage and kl_advantage with 95% intervals over seeds, paired, n_seeds. Raises
    `KeyError` if `reference` or "none" is not in the grid.
    """
    hit = grid[grid["type"] != NONE]
    means = hit.groupby(["task", "reader", "seed"])[["nll", "nll_clean", "kl"]].mean()
    rows = []
    for task, reader in means.index.droplevel("seed").unique():
        own, other, undefended = (means.loc[task, name] for name in (reader, reference, "none"))
        named = {
            "nll_advantage": stats.ratio_interval(
                other["nll"] - own["nll"], undefended["nll"] - undefended["nll_clean"]
            ),
            "kl_advantage": stats.ratio_interval(other["kl"] - own["kl"], undefended["kl"]),
        }
        row = {"task": task, "reader": reader, "n_seeds": len(own)}
        for name, interval in named.items():
            row |= interval.columns(name)
        rows.append(row)
    return pd.DataFrame(rows)


def means_over_seeds(rows: pd.DataFrame, keys: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Mean and 95% t interval over seeds of `columns` for every group of `keys`, and n_seeds; first means of a seed."""
    result = []
    for key, group in rows.groupby(list(keys), sort=False):
        of_seeds = group.groupby("seed")[list(columns)].mean()
        row = dict(zip(keys, key, strict=True))
        for name in columns:
            interval = stats.t_interval(of_seeds[name])
            row |= interval.columns(name)
        result.append(row | {"n_seeds": len(of_seeds)})
    return pd.DataFrame(result)
