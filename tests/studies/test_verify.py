"""`make verify` catches a changed byte and a row that cannot be computed again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest

from cachemedic.core.files import seal
from cachemedic.studies.run import ROOT
from cachemedic.studies.verify import Agreement, check_files, check_operators, check_sample, compare, report
from cachemedic.studies.verify_sample import Sample
from cachemedic.studies.verify_samples import SAMPLES


def failed(agreements: Iterable[Agreement]) -> list[str]:
    return [f"{line.name}: {line.found}" for line in agreements if not line.holds]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with one CSV of three rows and its sidecar."""
    data = b"seed,nll,accuracy\n0,2.5,\n1,3.5,0.5\n2,200,1\n"
    (tmp_path / "demo.csv").write_bytes(data)
    sidecar = {"sha256": hashlib.sha256(data).hexdigest(), "parameters": {"profile": "paper", "shift": 0.01}}
    (tmp_path / "demo.json").write_bytes(seal(sidecar))
    return tmp_path


def test_a_changed_byte_is_caught(results: Path) -> None:
    assert failed(check_files(results)) == []
    data = bytearray((results / "demo.csv").read_bytes())
    data[-3] ^= 1
    (results / "demo.csv").write_bytes(data)
    (line,) = failed(check_files(results))
    assert line.startswith("demo.csv:")
    assert "is not" in line


def test_a_missing_half_is_caught(results: Path) -> None:
    shutil.copy(results / "demo.csv", results / "alone.csv")
    shutil.copy(results / "demo.json", results / "gone.json")
    assert failed(check_files(results)) == ["alone.csv: alone.json is missing", "gone.csv: gone.csv is missing"]


def test_a_damaged_operator_is_caught(tmp_path: Path) -> None:
    shipped = next(path for path in sorted((ROOT / "trained").iterdir()) if path.is_dir())
    copy = shutil.copytree(shipped, tmp_path / shipped.name)
    assert failed(check_operators(tmp_path)) == []
    weights = bytearray((copy / "operator.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "operator.safetensors").write_bytes(weights)
    (line,) = failed(check_operators(tmp_path))
    assert "damaged" in line


def test_rows_are_computed_with_the_recorded_parameters_and_compared(results: Path) -> None:
    def computed(run) -> pd.DataFrame:
        frame = pd.read_csv(results / "demo.csv").iloc[::-1]  # in another order
        return frame.assign(nll=frame["nll"] * (1 + run.parameters["shift"]))

    def sample(tolerance: float) -> Sample:
        return Sample("demo", "all rows", ("seed",), {"nll": tolerance, "accuracy": 0.0}, computed)

    assert failed(check_sample(sample(0.0101), results)) == [], "relative to values above 1"
    assert failed(check_sample(sample(0.0099), results)) == ["demo: 1.0e-02, allowed 1e-02"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": [0, 7]}, "no row for {'seed': 7}"),
        ({"accuracy": [0.5, 0.5]}, "inf, allowed"),  # a value where none was
        ({"accuracy": [None, None]}, "inf, allowed"),  # and none where a value was
    ],
)
def test_missing_rows_and_values_disagree(results: Path, changed: dict, message: str) -> None:
    committed = pd.read_csv(results / "demo.csv")
    sample = Sample("demo", "two rows", ("seed",), {"nll": 1e-3, "accuracy": 1e-3}, lambda run: committed)
    computed = committed.head(2)
    assert failed(compare(sample, committed, computed)) == []
    (line,) = failed(compare(sample, committed, computed.assign(**changed)))
    assert message in line


def test_keys_have_to_name_one_row(results: Path) -> None:
    committed = pd.read_csv(results / "demo.csv")
    sample = Sample("demo", "all rows", ("seed",), {"nll": 1e-3}, lambda run: committed)
    (line,) = failed(compare(sample, pd.concat([committed, committed]), committed))
    assert "seed do not name one row each" in line


def test_disagreements_are_counted_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [Agreement("demo", "nll", "0.0", True), Agreement("demo", "kl", "0.1", False)]
    assert report(iter(lines)) == 1
    agrees, differs = capsys.readouterr().out.splitlines()
    assert agrees.split()[:3] == ["agrees", "demo", "nll"]
    assert differs.split()[:3] == ["DIFFERS", "demo", "kl"]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.csv}-{sample.what}")
def test_samples_name_committed_columns(sample: Sample) -> None:
    committed = pd.read_csv(ROOT / "results" / f"{sample.csv}.csv")
    assert {*sample.keys, *sample.tolerance} <= set(committed)


def test_a_committed_summary_follows_from_the_committed_grid() -> None:
    (sample,) = (sample for sample in SAMPLES if sample.csv == "main_recovery_by_type")
    assert failed(check_sample(sample, ROOT / "results")) == []
