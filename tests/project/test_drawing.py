"""Computing apart from drawing: to edit a figure or a table recomputes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from toy_project import ROOT, TABLE, Project

from graph import STUDIES, Graph

LIBRARY = (
    "core/errors.py",
    "core/files.py",
    "studies/jobs.py",
    "studies/paper_numbers.py",
    "studies/result_files.py",
    "studies/run.py",
    "studies/report.py",
    "studies/drawing/style.py",
)
STUDY = """\
from pathlib import Path
import pandas as pd

def results(run):
    with open(Path(__file__).with_name("computed"), "a") as file:
        file.write("x")
    return {"line": pd.DataFrame({"y": range(3)})}
"""
DRAWING = """\
import matplotlib.pyplot as plt

def line(rows):
    figure, axes = plt.subplots()
    axes.plot(rows.y, color="red")
    return figure
"""
PAGE = """\
from cachemedic.studies.drawing.lines import line
from cachemedic.studies.report import Report
report = Report(profile, seeds=[0])
rows = report.results("line")["line"]
report.save_figure(line(rows), "line")
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A notebook with a study that notes each time it computes, and the real classes for runs and reports."""
    project = Project(tmp_path)
    for name in LIBRARY:
        (tmp_path / "cachemedic" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "cachemedic" / name, tmp_path / "cachemedic" / name)
    project.write("cachemedic/studies/computing/line.py", STUDY)
    project.write("cachemedic/studies/drawing/lines.py", DRAWING)
    project.write("notebooks/graph.toml", f'{TABLE}[40_line]\ncsv = ["line"]\nfigures = ["line"]\n')
    project.notebook("40_line", PAGE)
    return project


def test_an_edited_figure_is_drawn_again_without_computing(project: Project) -> None:
    computed = project.root / "cachemedic/studies/computing/computed"
    made = [project.root / name for name in ("results/line.csv", "results/line.json", "figures/line.pdf")]
    assert project.ran("figures/line.pdf") == {"40_line"}
    assert computed.read_text() == "x"
    first = [path.read_bytes() for path in made]
    project.write("cachemedic/studies/drawing/lines.py", DRAWING.replace("red", "blue"))
    assert project.ran("figures/line.pdf") == {"40_line"}
    assert computed.read_text() == "x", "the CSV was read"
    second = [path.read_bytes() for path in made]
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    project.write("cachemedic/studies/computing/line.py", STUDY.replace("range(3)", "range(4)"))
    assert project.ran("figures/line.pdf") == {"40_line"}
    assert computed.read_text() == "xx", "what computes was changed"


def test_a_forged_csv_is_computed_again(project: Project) -> None:
    project.make("figures/line.pdf")
    project.write("results/line.csv", "y,config_hash\n9,forged\n")
    project.make("figures/line.pdf")
    assert "forged" not in (project.root / "results/line.csv").read_text()


GRAPH = Graph(ROOT)
FOLDER = ROOT / STUDIES.replace(".", "/")
STUDIED = [name for name, notebook in GRAPH.notebooks.items() if (FOLDER / f"{notebook.study}.py").exists()]


@pytest.mark.parametrize("name", STUDIED)
def test_results_do_not_depend_on_what_draws_them(name: str) -> None:
    drawing = ("notebooks/", "cachemedic/studies/drawing/", "cachemedic/studies/report.py")
    assert not [path for path in GRAPH.inputs(name) if path.startswith(drawing)]


@pytest.mark.parametrize("name", STUDIED)
def test_a_page_computes_nothing(name: str) -> None:
    for path in GRAPH.page(name):
        code = (ROOT / path).read_text()
        assert not re.search(r"^ *\"?(import|from) (torch|transformers)", code, re.MULTILINE), path


def test_all_notebooks_but_the_quickstart_have_a_study() -> None:
    assert set(GRAPH.notebooks) - set(STUDIED) == {"01_quickstart"}
