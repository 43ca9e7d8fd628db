"""What depends on what: the table of notebooks and the imports of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_project import ROOT, Project

from graph import Graph, GraphError, rules
from imports import Modules


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[a]\nneeds = ["b"]\n[b]\nneeds = ["a"]', "circle: a -> b -> a"),
        ('[figure]\nneeds = ["figur"]\n[figures]', "unknown notebook needed by"),
        ("[a]\nfigure = []", "nearest: figures"),
        ('[a]\ncsv = ["x"]\n[b]\ncsv = ["x"]', "results/x.csv is made twice, by a and by b"),
        ("[a]\ncsv = [", "graph.toml is missing or damaged"),
        ("a = 1", "graph.toml is damaged: a is no table"),
        ('[a]\ncsv = "x"', r"csv of \[a\] in notebooks/graph.toml is 'x', no list"),
        ("[a]\nminutes = 3", r"minutes of \[a\] in notebooks/graph.toml is 3, no dict"),
    ],
)
def test_wrong_tables_are_refused(fresh: Project, table: str, message: str) -> None:
    fresh.write("notebooks/graph.toml", table)
    with pytest.raises(GraphError, match=message):
        Graph(fresh.root)


def test_reproduce_leaves_out_what_is_apart(fresh: Project) -> None:
    fresh.write("notebooks/graph.toml", '[a]\n[b]\napart = true\ncsv = ["x"]')
    graph = Graph(fresh.root)
    assert graph.goals(["reproduce"]) == ["a"]
    assert graph.goals(["results/x.csv"]) == ["b"]
    assert "NOTEBOOKS := a\nAPART := b\n" in rules(graph)


def test_inputs_follow_imports(fresh: Project) -> None:
    fresh.write("cachemedic/style.py", "")
    fresh.write("cachemedic/toy.py", "def write():\n    import cachemedic.deep as deep\n")
    fresh.write("cachemedic/deep.py", "")
    fresh.notebook("10_map", "%matplotlib inline\nfrom cachemedic import write")
    used = {name for name in Graph(fresh.root).inputs("10_map") if name.startswith("cachemedic")}
    assert used == {"cachemedic/__init__.py", "cachemedic/toy.py", "cachemedic/deep.py"}
    fresh.notebook("10_map", "import cachemedic as cm\ncm.anything()")
    assert "cachemedic/style.py" in Graph(fresh.root).inputs("10_map"), "a bare import may use every module"


def test_training_does_not_depend_on_the_style_of_figures() -> None:
    used = Modules(ROOT / "cachemedic").used_by("import cachemedic.training.trainer", "training")
    assert ROOT / "cachemedic/training/trainer.py" in used
    assert ROOT / "cachemedic/studies/report.py" not in used
