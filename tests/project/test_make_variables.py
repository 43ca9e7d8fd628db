"""What a person gives to make reaches the program as it is, and the shell runs none of it."""

import json
import subprocess
from pathlib import Path

import pytest
from toy_project import ENVIRONMENT, run_make

ROOT = Path(__file__).parents[2]
RECORDER = "import json, pathlib, sys; pathlib.Path('seen.json').write_text(json.dumps(sys.argv[1:]))"
NAMES = ("BASE", "SEEDS", "FAMILY", "OBJECTIVE", "TEXT", "REVIEWS", "DEVICE")
SPELLINGS = [
    "gpt2",
    "x'; touch y; '",
    'a"b',
    "with space",
    "$HOME",
    "$$",
    "$(shell touch y)",
    "`touch y`",
    "a&touch y",
    "a,b(c)",
    "'",
]


@pytest.fixture
def project(tmp_path):
    """The Makefile with a table of one notebook, and a program that keeps its arguments in place of python."""
    folder = tmp_path / "a folder"
    for name in ("tools", "notebooks", "build"):
        (folder / name).mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name in ("notebooks/graph.toml", "tools/graph.py", "tools/imports.py"):
        (folder / name).touch()
    (folder / "build/rules.mk").write_text("NOTEBOOKS := 13_second_model\n")
    (folder / "tools/run_notebook.py").write_text(RECORDER)
    (folder / "tools/graph.py").write_text(RECORDER)
    (folder / "tools/parameters.py").write_text(RECORDER.replace("seen", "checked"))
    (folder / "build/rules.mk").touch()
    return folder


def arguments_of(folder, *arguments):
    run_make(folder, "RUN=python3", "READY=requirements.txt", *arguments)
    assert not (folder / "y").exists()
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("given", SPELLINGS)
def test_options_reach_the_program_as_they_are(project, given):
    options = [f"{name}={given}" for name in NAMES]
    seen = arguments_of(project, "13_second_model", *options)
    assert {f"{name}={given}" for name in map(str.lower, NAMES[:-1])} <= set(seen)
    assert seen[seen.index("--device") + 1] == given
    checked = json.loads((project / "checked.json").read_text())
    assert set(checked) == {f"{name}={given}" for name in NAMES}


def test_nothing_is_checked_where_nothing_is_given(project):
    arguments_of(project, "13_second_model")
    assert not (project / "checked.json").exists()


def test_goals_are_words_to_the_shell(project):
    goal = "figures/x;touch y;.pdf"
    assert arguments_of(project, goal) == ["explain", goal]
    assert arguments_of(project, "13_second_model", "figures/it's.pdf")[-1] == "figures/it's.pdf"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("PROFILE=smoke paper", "PROFILE=smoke paper is not one word; allowed: paper, smoke"),
        ("PROFILE=", "is not one word"),
        ("PROFILE=x;touch y", "PROFILE=x;touch y is not one word"),
        ("PROFILE=smok", "unknown PROFILE=smok; allowed: paper, smoke"),
        ("VENV=my env", "VENV=my env: make cannot name a folder with spaces"),
        ("VENV=x;y", "VENV=x;y: make cannot name a folder with ;"),
    ],
)
def test_what_cannot_be_one_word_is_refused(project, given, message):
    assert message in run_make(project, given, "help", fails=True)


def test_the_path_of_python_may_have_spaces(project):
    own = project / "my python"
    own.write_text('#!/bin/sh\nexec python3 "$@"\n')
    own.chmod(0o755)
    done = subprocess.run(
        ["make", f"PYTHON={own}", "figures/a.pdf"], cwd=project, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "seen.json").read_text()) == ["explain", "figures/a.pdf"]
