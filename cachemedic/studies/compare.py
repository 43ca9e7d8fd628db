"""Whether results of now agree with those of the last commit: `make compare`.

    python -m cachemedic.studies.compare [--brief] [CSV ...]    # names without folder and suffix; all by default

Processors round differently, so numbers may differ by a tolerance: that of the samples of `make verify` where these
know the column, but `TOLERANCE` at least. Differences of values above 1 are relative to them. A number with an
interval, and its bounds, may also differ by `OF_INTERVAL` of the interval's width: a rounded code or copy jumps where
its input moves by the last digit. What was trained at rates that destroy a model may differ by `AMPLIFIED`. Whole
numbers and text have to be equal, unless a sample says otherwise, and rows have to come in the same order. Times are
not compared.

Prints what is not the same bytes, column by column, and five lines; the exit status is 1 if anything differs, 2 if
there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cachemedic.core.errors import nearest_valid
from cachemedic.studies.committed import committed_results
from cachemedic.studies.run import ROOT

TOLERANCE = 2e-3  # of numbers that no sample knows, and of those that samples compute from committed numbers
OF_INTERVAL = 0.25  # half the distance from a mean to its bounds
AMPLIFIED = {"gate_learning_rates": 5e-2, "gate_valence": 5e-2}  # by training at rates that destroy the model
EXACT, WITHIN, DIFFERS, TIMES = "agree exactly", "agree within tolerance", "differ", "not compared, they measure times"


@dataclass(frozen=True)
class Comparison:
    """What was found of one CSV: one of the four verdicts, and what is not the same, in words."""

    csv: str
    verdict: str
    found: tuple[str, ...] = ()


def compare(committed: Mapping[str, bytes], root: Path, names: Sequence[str] = ()) -> Iterator[Comparison]:
    """Compares CSVs below `root`/results, all or those named, with committed files by their paths.

    Raises `ValueError` for an unknown name.
    """
    known = {path[len("results/") : -len(".csv")]: path for path in committed if path.endswith(".csv")}
    for name in names:
        if name not in known:
            raise nearest_valid("committed CSV", name, known)
    for name in names or known:
        old, path = committed[known[name]], root / known[name]
        if not path.is_file():
            yield Comparison(name, DIFFERS, ("the file is missing",))
        elif path.read_bytes() == old:
            yield Comparison(name, EXACT)
        elif _measures_times(name, committed):
            yield Comparison(name, TIMES)
        else:
            yield compare_tables(name, pd.read_csv(io.BytesIO(old)), pd.read_csv(path))


def _measures_times(name: str, committed: Mapping[str, bytes]) -> bool:
    sidecar = json.loads(committed.get(f"results/{name}.json", b"{}"))
    return name.startswith("bench_") or "times" in sidecar.get("parameters", {})


def compare_tables(name: str, old: pd.DataFrame, new: pd.DataFrame) -> Comparison:
    """Compares two tables, column by column, row by row."""
    if list(old) != list(new):
        return Comparison(name, DIFFERS, (f"columns: {sorted(set(old) ^ set(new)) or 'their order'}",))
    if len(old) != len(new):
        return Comparison(name, DIFFERS, (f"{len(new)} rows, {len(old)} committed",))
    tolerances, found, holds = _tolerances(name), [], True
    for column in old:
        a, b = old[column], new[column]
        if a.equals(b):
            continue
        if column not in tolerances and not (pd.api.types.is_float_dtype(a) and pd.api.types.is_float_dtype(b)):
            found.append(f"{column}: {int((a != b).sum())} of {len(a)} rows have another value")
            holds = False
            continue
        allowed = max(tolerances.get(column, 0.0), AMPLIFIED.get(name, TOLERANCE))
        change = ((b - a).abs() / a.abs().clip(1)).mask(a.isna() & b.isna(), 0.0).fillna(np.inf)
        of_interval = (OF_INTERVAL * _widths(old, column) / a.abs().clip(1)).fillna(0.0)
        found.append(f"{column}: {float(change.max()):.1e}, allowed {allowed:.0e}")
        holds = holds and bool((change <= of_interval.clip(lower=allowed)).all())
    return Comparison(name, WITHIN if holds else DIFFERS, tuple(found))


def _widths(table: pd.DataFrame, column: str) -> pd.Series:
    """The width of the interval that a column is the mean or a bound of, row by row; 0 without."""
    mean = column.removesuffix("_low").removesuffix("_high")
    low, high = f"{mean}_low", f"{mean}_high"
    if low not in table or high not in table:
        return pd.Series(0.0, table.index)
    return (table[high] - table[low]).fillna(0.0)


def _tolerances(name: str) -> dict[str, float]:
    # imported here only: it brings torch, which files of the same bytes can spare
    from cachemedic.studies.verify_samples import SAMPLES

    found: dict[str, float] = {}
    for sample in SAMPLES:
        if sample.csv == name:
            found |= {column: max(limit, found.get(column, 0.0)) for column, limit in sample.tolerance.items()}
    return found


def summary(commit: str, comparisons: Sequence[Comparison]) -> list[str]:
    """Five lines: what was compared, and how many have each verdict, with the names of those that are not the same."""
    lines = [f"compared with commit {commit}: {len(comparisons)} CSVs"]
    for verdict in (EXACT, WITHIN, DIFFERS, TIMES):
        names = [comparison.csv for comparison in comparisons if comparison.verdict == verdict]
        listed = f" ({', '.join(names)})" if names and verdict != EXACT else ""
        lines.append(f"  {verdict}: {len(names)}{listed}")
    return lines


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cachemedic.studies.compare", description=__doc__)
    parser.add_argument("csv", nargs="*", help="names without folder and suffix; all by default")
    parser.add_argument("--brief", action="store_true", help="the five lines only")
    options = parser.parse_args(arguments)
    try:
        commit, committed = committed_results(ROOT)
        comparisons = list(compare(committed, ROOT, options.csv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.brief:
        for comparison in comparisons:
            for line in comparison.found:
                print(f"  {comparison.verdict:24} {comparison.csv:28} {line}")
    print("\n".join(summary(commit, comparisons)))
    return int(any(comparison.verdict == DIFFERS for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
