"""Results of now beside the committed ones, and that `make verify` checks the committed ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pandas as pd
import pytest

from cachemedic.core.files import digest, seal
from cachemedic.studies import compare
from cachemedic.studies.committed import committed_results
from cachemedic.studies.compare import DIFFERS, EXACT, TIMES, WITHIN, Comparison
from cachemedic.studies.verify import check_files, results_of

ROWS = {"reader": ["none", "E"], "n": [3, 4], "nll": [2.5, 300.0], "gap": [None, 0.5]}


def put(root: Path, name: str, rows: dict, **parameters: str) -> None:
    """A CSV and its sidecar, as a run writes them."""
    data = pd.DataFrame(rows).to_csv(index=False).encode()
    (root / "results").mkdir(exist_ok=True)
    (root / f"results/{name}.csv").write_bytes(data)
    (root / f"results/{name}.json").write_bytes(seal({"sha256": digest(data), "parameters": parameters}))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with three committed CSVs, one of which holds times."""
    put(tmp_path, "grid", ROWS)
    put(tmp_path, "rank", ROWS)
    put(tmp_path, "cost", {"ms": [1.5]}, times="not the same bytes twice")
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=results"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def compared(root: Path, *names: str) -> dict[str, Comparison]:
    _, committed = committed_results(root)
    return {comparison.csv: comparison for comparison in compare.compare(committed, root, names)}


def test_results_as_they_were_committed_agree_exactly(checkout: Path) -> None:
    assert {comparison.verdict for comparison in compared(checkout).values()} == {EXACT}


@pytest.mark.parametrize(
    ("changed", "verdict", "found"),
    [
        ({"nll": [2.5, 300.3]}, WITHIN, "nll: 1.0e-03, allowed 2e-03"),
        ({"nll": [2.5, 301.0]}, DIFFERS, "nll: 3.3e-03, allowed 2e-03"),
        ({"gap": [0.5, 0.5]}, DIFFERS, "gap: inf"),
        ({"n": [3, 5]}, DIFFERS, "n: 1 of 2 rows have another value"),
        ({"reader": ["E", "none"]}, DIFFERS, "reader: 2 of 2 rows have another value"),
        ({"extra": [0, 0]}, DIFFERS, "columns: ['extra']"),
    ],
)
def test_what_a_run_changed_is_told_by_column(checkout: Path, changed: dict, verdict: str, found: str) -> None:
    put(checkout, "grid", ROWS | changed)
    comparison = compared(checkout)["grid"]
    assert comparison.verdict == verdict
    assert comparison.found[0].startswith(found)


def test_fewer_rows_and_missing_files_differ(checkout: Path) -> None:
    put(checkout, "grid", {name: values[:1] for name, values in ROWS.items()})
    (checkout / "results/rank.csv").unlink()
    found = compared(checkout)
    assert found["grid"].found == ("1 rows, 2 committed",)
    assert found["rank"].found == ("the file is missing",)


def test_columns_that_samples_know_have_their_tolerance() -> None:
    old, new = pd.DataFrame({"accuracy": [0.5]}), pd.DataFrame({"accuracy": [0.54]})
    assert compare.compare_tables("main_grid", old, new).verdict == WITHIN
    assert compare.compare_tables("another", old, new).verdict == DIFFERS


@pytest.mark.parametrize(("kl", "verdict"), [(0.32, WITHIN), (0.40, DIFFERS)])
def test_a_number_may_move_within_a_part_of_its_interval(kl: float, verdict: str) -> None:
    old = pd.DataFrame({"kl": [0.3], "kl_low": [0.2], "kl_high": [0.4]})
    assert compare.compare_tables("another", old, old.assign(kl=kl)).verdict == verdict


def test_a_number_that_is_missing_in_both_agrees_where_another_moves_a_little() -> None:
    old, new = (pd.DataFrame({"kl": [0.5, None], "gap": [gap, None]}) for gap in (0.25, 0.25 + 1e-9))
    assert compare.compare_tables("grid", old, new).verdict == WITHIN


def test_what_was_trained_to_destruction_may_move_further() -> None:
    old, new = (pd.DataFrame({"ratio": [1.0, ratio]}) for ratio in (0.8, 0.82))
    assert compare.compare_tables("grid", old, new).verdict == DIFFERS
    assert compare.compare_tables("gate_valence", old, new).verdict == WITHIN


def test_times_are_not_compared(checkout: Path) -> None:
    put(checkout, "cost", {"ms": [2.5]}, times="not the same bytes twice")
    assert compared(checkout)["cost"].verdict == TIMES


def test_five_lines_and_an_exit_status(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "ROOT", checkout)
    assert compare.main(["--brief"]) == 0
    put(checkout, "grid", ROWS | {"nll": [2.5, 400.0]})
    capsys.readouterr()
    assert compare.main(["--brief"]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("3 CSVs")
    assert lines == [f"  {EXACT}: 2", f"  {WITHIN}: 0", f"  {DIFFERS}: 1 (grid)", f"  {TIMES}: 0"]
    assert compare.main(["rank"]) == 0
    assert compare.main(["gird"]) == 2
    assert "unknown committed CSV 'gird': did you mean 'grid'?" in capsys.readouterr().err


def test_verify_checks_what_was_committed_after_a_run_has_replaced_it(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    put(checkout, "grid", ROWS | {"nll": [9.0, 9.0]})
    results = results_of(checkout, tmp_path_factory.mktemp("copies"))
    assert pd.read_csv(results / "grid.csv")["nll"].tolist() == ROWS["nll"]
    assert all(line.holds for line in check_files(results))
    assert "2 files are others now, which `make compare` compares" in capsys.readouterr().out


def test_without_git_results_are_checked_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    put(tmp_path, "grid", ROWS)
    assert results_of(tmp_path, tmp_path / "copies") == tmp_path / "results"
    with pytest.raises(ValueError, match="no committed results"):
        committed_results(tmp_path)
