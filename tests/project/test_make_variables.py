"""What a person gives to make reaches the program as it is, and the shell runs none of it."""

import json
import subprocess
from pathlib import Path

import pytest
from toy_project import ENVIRONMENT, run_make, stand_in

ROOT = Path(__file__).parents[2]
# Rules run beside one another: what one wrote is replaced whole.
RECORDER = """import json, os, pathlib, sys
new = pathlib.Path(f"new-{os.getpid()}")
new.write_text(json.dumps(sys.argv[1:]))
new.replace("seen.json")"""
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


@pytest.mark.parametrize("name", ["PROFILE", "VENV", "PYTHON", "RETRAIN", "CONTAINER", "CACHEMEDIC_CACHE"])
def test_make_runs_nothing_of_any_variable(project, name):
    done = subprocess.run(["make", "help", f"{name}=$(shell touch y)`touch y`"], cwd=project, env=ENVIRONMENT)
    assert not (project / "y").exists()
    assert (done.returncode == 0) == (name not in ("PROFILE", "VENV"))


def test_the_cache_folder_is_below_build_unless_it_is_given(project):
    show = "print(__import__('os').environ['CACHEMEDIC_CACHE'])"
    (project / "tools/torture.py").write_text(show)
    for given, seen in (("", f"{project}/build/cache"), ("CACHEMEDIC_CACHE=/a b/$x", "/a b/$x")):
        made = run_make(project, "RUN=python3", "READY=requirements.txt", "torture", *filter(None, [given]))
        assert made.strip() == seen


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
        ("CLUSTER={}", "CLUSTER holds options of jobs: it needs EXECUTOR=slurm or EXECUTOR=local"),
    ],
)
def test_what_cannot_be_one_word_is_refused(project, given, message):
    assert message in run_make(project, given, "help", fails=True)


def test_the_path_of_python_may_have_spaces(project):
    own = project / "my python"
    stand_in(own, 'exec python3 "$@"')
    done = subprocess.run(
        ["make", f"PYTHON={own}", "figures/a.pdf"], cwd=project, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "seen.json").read_text()) == ["explain", "figures/a.pdf"]


def test_an_environment_that_is_there_is_used_as_it_is(project):
    stand_in(project / "conda/bin/python", 'echo "$@" >> asked')
    unused = project / "unused"
    stand_in(unused, "exit 1")
    for _ in range(2):
        run_make(project, "VENV=conda", f"PYTHON={unused}", "test")
    asked = (project / "asked").read_text().splitlines()
    assert asked[1] == "-m pip install --requirement requirements.txt"
    first, second = asked[3:]
    assert first == second, "installed once"
    assert first.startswith("-m pytest")
