"""What is installed, and what is committed, is what the files say."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from graph import Graph
from run_notebook import parameter_names

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBERED = [path for path in NOTEBOOKS if path.name[0].isdigit()]  # the others make no results
PARAMETERS = {"profile", "base", "device", "seeds"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned_once_to_a_public_version() -> None:
    pins = requirements("requirements.txt")
    for pin in pins:
        assert [s.operator for s in pin.specifier] == ["=="], f"{pin} is not pinned"
        assert "+" not in str(pin.specifier), f"{pin} exists in one build only"
        assert pin.url is None
    names = [canonical(pin.name) for pin in pins]
    assert len(names) == len(set(names))


def test_direct_requirements_are_among_the_pins() -> None:
    pins = {canonical(pin.name): pin for pin in requirements("requirements.txt")}
    direct = {canonical(r.name) for r in requirements("requirements.in")}
    assert direct <= set(pins)
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        needed = Requirement(line)
        assert canonical(needed.name) in direct
        (version,) = pins[canonical(needed.name)].specifier
        assert needed.specifier.contains(version.version), f"the pin {version} does not satisfy {needed}"


def test_conda_environment_installs_the_same_pins() -> None:
    *conda, last = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert last == {"pip": ["--requirement requirements.txt", "--editable ."]}
    (python,) = (entry.partition("=")[2] for entry in conda if entry.startswith("python="))
    assert conda == [f"python={python}", "pip", "make"], "a version named here could differ from its pin"
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{required}").specifier.contains(python)


def test_table_and_notebooks_agree() -> None:
    assert set(Graph().notebooks) == {path.stem for path in NUMBERED}


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_notebooks_that_make_results_take_the_common_parameters(path: Path) -> None:
    assert set(parameter_names(Graph(), path.stem)) >= PARAMETERS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_takes_a_base_and_a_device(path: Path) -> None:
    assert set(parameter_names(Graph(), path.stem)) >= {"base", "device"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_clean(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), f"{path.name} has outputs; clear them before committing"
        assert cell.get("execution_count") is None


def test_committed_results_have_their_hashes_and_a_maker() -> None:
    for path in (ROOT / "results").glob("*.json"):
        sidecar = json.loads(path.read_text())
        digest = hashlib.sha256((ROOT / sidecar["file"]).read_bytes()).hexdigest()
        assert digest == sidecar["sha256"], f"{sidecar['file']} is not what was made"
    outputs = {output for notebook in Graph().notebooks.values() for output in notebook.outputs}
    committed = [path for path in (ROOT / "results").glob("*.csv") if not path.name.startswith("bench_")]
    for path in committed:
        assert path.relative_to(ROOT).as_posix() in outputs, f"no notebook makes {path.name}"
