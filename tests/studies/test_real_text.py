"""The real-text results keep their hashes when they are copied to their place."""

from __future__ import annotations

import hashlib
import json

import pandas as pd
import pytest

from cachemedic.studies.real_text import adopt
from cachemedic.studies.report import Report
from cachemedic.studies.verify import check_files


def variant(folder):
    run = Report("paper", folder)
    run.write_csv(pd.DataFrame({"x": [1.5]}), "second_model_grid")
    run.write_table(pd.DataFrame({"x": [1.5]}), "second_model", "Caption.")
    (folder / "figures").mkdir()
    (folder / "figures" / "second_model_contraction.pdf").write_bytes(b"figure")
    return folder


def test_results_are_copied_with_their_sidecars(tmp_path):
    root = tmp_path / "root"
    adopt(variant(tmp_path / "variant"), root)
    made = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert made == {
        "results/real_text/grid.csv", "results/real_text/grid.json", "paper/tables/real_text.tex",
        "figures/real_text_contraction.pdf",
    }  # fmt: skip
    table = (root / "results/real_text/grid.csv").read_bytes()
    sidecar = json.loads((root / "results/real_text/grid.json").read_text())
    assert (sidecar["file"], sidecar["sha256"]) == ("results/real_text/grid.csv", hashlib.sha256(table).hexdigest())
    assert r"\label{tab:real_text}" in (root / "paper/tables/real_text.tex").read_text()
    assert [(line.name, line.holds) for line in check_files(root / "results")] == [("real_text/grid.csv", True)]


def test_nothing_is_copied_of_what_is_missing_or_changed(tmp_path):
    with pytest.raises(ValueError, match="holds no results of notebook 13"):
        adopt(tmp_path, tmp_path / "root")
    folder = variant(tmp_path / "variant")
    (folder / "results" / "second_model_grid.csv").write_text("x\n2\n")
    with pytest.raises(ValueError, match="is not the file that its sidecar records"):
        adopt(folder, tmp_path / "root")
    assert not (tmp_path / "root").exists()
