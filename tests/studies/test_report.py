from __future__ import annotations

import hashlib
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cachemedic.core.files import digest, seal
from cachemedic.studies.drawing.style import line_styles
from cachemedic.studies.paper_numbers import Claim, Number
from cachemedic.studies.report import AUTHOR, Report
from cachemedic.studies.run import ROOT, Run, config_hash
from graph import Graph


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """A run as the notebook runner sets it up."""
    context = {
        "notebook": "03_demo",
        "study": "demo",
        "csv": ["demo"],
        "work": str(tmp_path / "work"),
        "published": str(tmp_path / "published"),
        "inputs": {"notebooks/03_demo.ipynb": "0" * 64},
        "threads": 2,
        "retrain": True,
    }
    (tmp_path / "run.json").write_text(json.dumps(context))
    monkeypatch.setenv("CACHEMEDIC_RUN", str(tmp_path / "run.json"))
    return Report("smoke", base="embedded-gpt2", device="cpu", seeds=[0, 1])


def test_csv_has_fixed_digits_and_a_sidecar_that_explains_it(run: Report) -> None:
    run.write_csv(pd.DataFrame({"severity": [0.1, 1 / 3], "nll": [np.nan, 2.0]}), "demo")
    data = (run.folder / "results/demo.csv").read_bytes()
    digest = run.config_hash
    assert data.decode() == f"severity,nll,config_hash\n0.1,,{digest}\n0.33333333,2,{digest}\n"
    sidecar = json.loads((run.folder / "results/demo.json").read_text())
    assert sidecar["sha256"] == hashlib.sha256(data).hexdigest()
    assert sidecar["parameters"] == {"profile": "smoke", "base": "embedded-gpt2", "device": "cpu", "seeds": [0, 1]}
    assert sidecar["rows"] == 2
    assert sidecar["inputs"] == {"notebooks/03_demo.ipynb": "0" * 64}
    assert sidecar["commit"] is None or len(sidecar["commit"].removesuffix("-dirty")) == 40
    assert set(sidecar["versions"]) >= {"torch", "python", "numpy"}
    assert sidecar["wall_seconds"] >= 0
    assert run.retrain


def test_rows_keep_their_own_config_hash(run: Report) -> None:
    frame = pd.DataFrame({"rank": [4, 8], "config_hash": ["a", "b"]})
    assert list(run.write_csv(frame, "demo").config_hash) == ["a", "b"]


def test_config_hash_ignores_order_and_the_device(run: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1, "b": 3})
    on_gpu = Run("smoke", base="embedded-gpt2", device="cuda", seeds=[0, 1])
    assert on_gpu.config_hash == run.config_hash


def test_read_csv_finds_own_results_then_published_ones(run: Report) -> None:
    with pytest.raises(FileNotFoundError, match="make results/map.csv"):
        run.read_csv("map")
    (run.published / "results").mkdir(parents=True)
    (run.published / "results/map.csv").write_text("x\n1\n")
    with pytest.raises(ValueError, match="map.json does not exist"):
        run.read_csv("map")
    sidecar = run.published / "results/map.json"
    sidecar.write_bytes(seal({"sha256": digest(b"x\n2\n")}))
    with pytest.raises(ValueError, match="map.csv is not as map.json describes it"):
        run.read_csv("map")
    sidecar.write_bytes(seal({"sha256": digest(b"x\n1\n")}))
    assert run.read_csv("map").x[0] == 1
    whole = sidecar.read_bytes()
    changed = whole.replace(digest(b"x\n1\n").encode(), digest(b"x\n2\n").encode())
    for table, damaged in ((b"x\n1\n", whole[:-9]), (b"x\n1\n", whole.replace(b"sha", b"Sha")), (b"x\n2\n", changed)):
        (run.published / "results/map.csv").write_bytes(table)
        sidecar.write_bytes(damaged)
        with pytest.raises(ValueError, match="map.json is damaged"):
            run.read_csv("map")
    run.write_csv(pd.DataFrame({"x": [2]}), "map")
    assert run.read_csv("map").x[0] == 2


def test_figures_are_the_same_bytes_and_signed(run: Report) -> None:
    def save() -> list[bytes]:
        figure, axes = plt.subplots()
        for name, style in line_styles(["none", "repaired"]).items():
            axes.plot([0, 1], [0, 1], label=name, **style)
        axes.legend()
        run.save_figure(figure, "demo")
        plt.close(figure)
        return [(run.folder / f"figures/demo.{suffix}").read_bytes() for suffix in ("pdf", "png")]

    first = save()
    assert first == save()
    assert AUTHOR.encode() in first[1]
    assert b"CreationDate" not in first[0]


def test_lines_differ_in_colour_marker_and_dashes() -> None:
    names = [f"line {i}" for i in range(8)]
    styles = line_styles(names)
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in styles.values()}) == 8
    with pytest.raises(ValueError, match="at most 8 lines"):
        line_styles([*names, "one more"])


def test_table_is_booktabs_with_escaped_text(run: Report) -> None:
    frame = pd.DataFrame({"type_name": ["bit_flips", "50%"], "recovery": [0.12345, np.nan]})
    run.write_table(frame, "demo", caption=r"Recovery at $s = 1$.")
    table = (run.folder / "paper/tables/demo.tex").read_text()
    assert r"\toprule" in table
    assert r"\begin{tabular}{lr}" in table
    assert r"bit\_flips & 0.123" in table
    assert r"type\_name" in table
    assert r"50\% & --" in table
    assert r"\label{tab:demo}" in table


def test_outside_of_make_all_modules_are_inputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CACHEMEDIC_RUN", raising=False)
    Run("paper", folder=tmp_path).write_csv(pd.DataFrame({"milliseconds": [1.5]}), "bench_demo")
    inputs = json.loads((tmp_path / "results/bench_demo.json").read_text())["inputs"]
    module = ROOT / "cachemedic/studies/bench/decode.py"
    assert inputs["cachemedic/studies/bench/decode.py"] == hashlib.sha256(module.read_bytes()).hexdigest()


def test_by_hand_nothing_committed_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CACHEMEDIC_RUN", raising=False)
    run = Run("paper")
    assert run.folder.parts[-2:] == ("build", "lab")
    assert not run.retrain
    with pytest.raises(ValueError, match="unknown profile 'full'; allowed: paper, smoke"):
        Run("full")


def test_results_are_those_of_the_notebook_that_runs(run: Report) -> None:
    with pytest.raises(ValueError, match="the study of 03_demo is 'demo', not 'rank'"):
        run.results("rank")


def test_by_hand_committed_results_are_read_if_they_are_current(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CACHEMEDIC_RUN", raising=False)
    run = Run("paper", tmp_path / "lab", seeds=[0], device="cuda")
    run.published = tmp_path
    graph = Graph()
    made = Run("paper", tmp_path, seeds=[0], device="cpu")
    made.inputs = graph.inputs("09_kv_targets")
    for name in graph["09_kv_targets"].csv:
        made.write_csv(pd.DataFrame({"x": [1]}), name)
    assert run.results("kv_targets")["kv_targets_grid"].x[0] == 1
    with pytest.raises(ValueError, match="unknown study 'kv_target'"):
        run.results("kv_target")


def test_what_was_found_are_claims_with_the_numbers_of_this_run(run: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pd.DataFrame({"base": ["embedded-gpt2"], "recovery": [0.25]})
    monkeypatch.setattr(run, "_shown", {"demo"})
    run.write_csv(rows, "demo")
    here, elsewhere = ({"base": base} for base in ("embedded-gpt2", "embedded-llama"))
    claims = [
        Claim("It repairs a quarter", "results", "demo", (Number("Quarter", "demo", "recovery", here, format=".0%"),)),
        Claim("The other base", "results", "demo", (Number("Other", "demo", "recovery", elsewhere),)),
        Claim("Another notebook", "results", "rank_results", (Number("Third", "rank_results", "recovery"),)),
    ]
    monkeypatch.setattr("cachemedic.studies.paper_numbers.load", lambda: claims)
    assert run.found().data == "- It repairs a quarter: 25% (`Quarter`)."
