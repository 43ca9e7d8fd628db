"""A project of three tiny notebooks with the real Makefile and tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from graph import Graph
from records import Variant

ROOT = Path(__file__).resolve().parents[1]

TABLE = """
[10_map]
csv = ["map"]
[20_figure]
needs = ["10_map"]
figures = ["damage"]
minutes = { paper = 3 }
[30_apart]
data = ["data/*.txt"]
csv = ["apart"]
"""
FIGURE = "from cachemedic import write\nwrite('figures/damage.pdf', 'figures/damage.png')"
TOY = '''
import hashlib, json, os, pathlib

def write(*names):
    """Writes the named files where a run's files wait, sidecars of CSVs with the right hashes."""
    run = json.loads(pathlib.Path(os.environ["CACHEMEDIC_RUN"]).read_text())
    for name in names:
        path = pathlib.Path(run["work"], name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("made\\n")
        if path.suffix == ".csv":
            known = {"file": name, "sha256": hashlib.sha256(b"made\\n").hexdigest(), "inputs": run["inputs"]}
            known["checksum"] = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
            path.with_suffix(".json").write_text(json.dumps(known))
'''
NUMBERS = "import pathlib\npathlib.Path('paper').mkdir(exist_ok=True)\npathlib.Path('paper/numbers.tex').touch()"
COMPARED = "import sys\nprint('compared:', *sys.argv[1:])"
# What a surrounding make, or a notebook that runs the tests, would hand down.
HANDED_DOWN = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CACHEMEDIC_RUN", "CACHEMEDIC_CACHE"}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in HANDED_DOWN}


def run_make(folder: Path, *arguments: str, fails: bool = False) -> str:
    done = subprocess.run(["make", *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def stand_in(path: Path, code: str) -> None:
    """A shell script in place of a program: under its name it is whole and executable, also where one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.new")
    written.write_text(f"#!/bin/sh\n{code}\n")
    written.chmod(0o755)
    written.rename(path)


def started(output: str) -> list[str]:
    """The notebooks that make began to run, by what it printed."""
    return [line.split()[0] for line in output.splitlines() if ": running (" in line]


class Project:
    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Makefile", "requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, root)
        self.write("notebooks/graph.toml", TABLE)
        self.write("cachemedic/__init__.py", "from cachemedic.toy import write\n")
        self.write("cachemedic/toy.py", TOY)
        self.write("cachemedic/unused.py", "")
        self.write("cachemedic/studies/paper_numbers.py", NUMBERS)
        self.write("cachemedic/studies/compare.py", COMPARED)
        self.write("data/text.txt", "words")
        self.notebook("10_map", "from cachemedic import write\nwrite('results/map.csv')")
        self.notebook("20_figure", FIGURE)
        self.notebook("30_apart", "import cachemedic.toy\ncachemedic.toy.write('results/apart.csv')")

    def write(self, name: str, content: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def notebook(self, name: str, code: str, parameters: str = 'profile = "paper"', tag: str = "parameters") -> None:
        first = nbformat.v4.new_code_cell(parameters, metadata={"tags": [tag]}, id="first")
        cells = [first, nbformat.v4.new_code_cell(code, id="second")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), self.root / "notebooks" / f"{name}.ipynb")

    def make(self, *arguments: str, fails: bool = False) -> str:
        """Output of make; the environment of this test stands in for .venv."""
        installed = (f"PYTHON={sys.executable}", f"RUN={sys.executable}", "READY=requirements.txt")
        return run_make(self.root, *installed, *arguments, fails=fails)

    def ran(self, *arguments: str) -> set[str]:
        """The notebooks that make ran, each of them once."""
        found = started(self.make(*arguments))
        assert len(found) == len(set(found))
        return set(found)

    def stale(self, name: str, **options: bool) -> str | None:
        return Variant(Graph(self.root), "paper", {}).stale(name, **options)
