"""Checks the committed results: every byte by its hash, and a stated sample of rows by computing it again.

    python -m cachemedic.studies.verify     # what `make verify` runs

It takes about three minutes, and the exit status is 1 if anything differs.

What is checked is what the last commit holds, whatever a run has since put in its place (`make compare` compares that);
in a copy without git, what lies in results/. Rows are computed from scratch with the shipped base models and operators,
no cache of results is read. Other machines round differently, so each column has a tolerance, which the table states.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cachemedic.core.files import read_sealed
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.committed import committed_results
from cachemedic.studies.result_files import read_result
from cachemedic.studies.run import ROOT, Run
from cachemedic.studies.verify_sample import Sample
from cachemedic.studies.verify_samples import SAMPLES


@dataclass(frozen=True)
class Agreement:
    """One line of the table: a file or a column of a sample, what was found, and whether that is as it should be."""

    name: str
    checked: str
    found: str
    holds: bool


def check_files(results: Path) -> Iterator[Agreement]:
    """Every CSV under `results` against its sidecar, and every sidecar against its CSV."""
    files = [path for suffix in ("csv", "json") for path in results.rglob(f"*.{suffix}")]
    for stem in sorted({path.relative_to(results).with_suffix("").as_posix() for path in files}):
        table, sidecar = results / f"{stem}.csv", results / f"{stem}.json"
        missing = [path.name for path in (table, sidecar) if not path.is_file()]
        if missing:
            yield Agreement(f"{stem}.csv", "sha256", f"{missing[0]} is missing", False)
            continue
        try:
            read_result(table)
        except ValueError as error:
            yield Agreement(f"{stem}.csv", "sha256", str(error), False)
        else:
            yield Agreement(f"{stem}.csv", "sha256", "as recorded", True)


def check_operators(trained: Path) -> Iterator[Agreement]:
    """Every shipped operator under `trained` against the sha256 and the shapes that its config states."""
    for folder in sorted(path for path in trained.iterdir() if path.is_dir()):
        try:
            RepairOperator.from_pretrained(folder)
        except (ValueError, FileNotFoundError) as error:
            yield Agreement(folder.name, "sha256", str(error), False)
        else:
            yield Agreement(folder.name, "sha256", "as recorded", True)


def compare(sample: Sample, committed: pd.DataFrame, computed: pd.DataFrame) -> Iterator[Agreement]:
    """One line for each compared column of a sample; a computed row that was not committed is a disagreement."""
    keys = list(sample.keys)
    pairs = computed.merge(committed, how="left", on=keys, suffixes=("", " committed"), indicator="found")
    known = pairs["found"] == "both"
    if not known.all():
        yield Agreement(sample.csv, "rows", f"no row for {pairs[~known][keys].iloc[0].to_dict()}", False)
    if len(pairs) > len(computed):
        yield Agreement(sample.csv, "rows", f"{', '.join(keys)} do not name one row each", False)
    for column, tolerance in sample.tolerance.items():
        new, old = (pairs.loc[known, name].astype(float) for name in (column, f"{column} committed"))
        # a value that is not defined has to be undefined in both
        difference = ((new - old).abs() / old.abs().clip(1)).mask(new.isna() & old.isna(), 0.0).fillna(np.inf)
        largest = float(difference.max()) if len(difference) else np.inf
        found = f"{largest:.1e}, allowed {tolerance:.0e}"
        yield Agreement(sample.csv, f"{column} of {int(known.sum())} rows", found, largest <= tolerance)


def check_sample(sample: Sample, results: Path) -> Iterator[Agreement]:
    """Computes a sample and compares it with what is under `results`."""
    try:
        committed = read_result(results / f"{sample.csv}.csv")
        parameters = read_sealed(results / f"{sample.csv}.json")["parameters"]
    except ValueError as error:
        yield Agreement(sample.csv, "sha256", str(error), False)
        return
    run = Run(folder=results.parent, **parameters | {"device": "cpu"})
    yield from compare(sample, committed, sample.compute(run))


def report(agreements: Iterator[Agreement]) -> int:
    """Prints the lines as they come; returns how many of them do not hold."""
    failures = 0
    for line in agreements:
        failures += not line.holds
        print(f"  {'agrees' if line.holds else 'DIFFERS':8} {line.name:28} {line.checked:34} {line.found}", flush=True)
    return failures


def results_of(root: Path, copies: Path) -> Path:
    """The folder to check: the committed results of a checkout, copied below `copies`; without git, `root`/results."""
    try:
        commit, files = committed_results(root)
    except ValueError as error:
        print(f"{error}; results/ is checked as it is")
        return root / "results"
    for path, content in files.items():
        (copies / path).parent.mkdir(parents=True, exist_ok=True)
        (copies / path).write_bytes(content)
    changed = [path for path, content in files.items() if not _same(root / path, content)]
    made_anew = f"; {len(changed)} files are others now, which `make compare` compares" if changed else ""
    print(f"Results of commit {commit}{made_anew}")
    return copies / "results"


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def verify(results: Path) -> int:
    """Checks everything and prints it; returns how many lines do not hold."""
    print("Files, as their sidecars record them")
    failures = report(check_files(results)) + report(check_operators(ROOT / "trained"))
    for sample in SAMPLES:
        print(f"{sample.csv}: {sample.what}", flush=True)
        started = time.perf_counter()
        failures += report(check_sample(sample, results))
        print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)
    return failures


def main() -> None:
    with tempfile.TemporaryDirectory() as copies:
        failures = verify(results_of(ROOT, Path(copies)))
    if failures:
        sys.exit(f"error: {failures} of the lines above differ")
    print("All agree. Times (results/bench_*.csv) are checked by their hashes only: they differ from run to run.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
