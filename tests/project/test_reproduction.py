"""The mechanism behind `make reproduce`, on a tiny project in a temporary folder."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from toy_project import ENVIRONMENT, FIGURE, TABLE, Project, run_make, stand_in, started

from graph import Graph
from records import Variant

MEETING = """\
import pathlib, time
from cachemedic import write
pathlib.Path({own!r}).touch()
waited = 0
while not pathlib.Path({other!r}).exists() and waited < 600:
    time.sleep(0.1)
    waited += 1
assert waited < 600, "the other one does not run"
write({output!r})
"""
EXCLUSIVE = """\
import pathlib, time
from cachemedic import write
busy = pathlib.Path("busy")
busy.touch(exist_ok=False)
time.sleep(1)
busy.unlink()
write({output!r})
"""
PROGRESS = """\
import os
from cachemedic import write
from tqdm.auto import tqdm
assert [os.environ[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")] == ["1", "1", "1"]
for name in tqdm(["results/map.csv"]):
    write(name)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which everything has been made, each notebook once, by two makes at once with two jobs each."""
    project = Project(tmp_path_factory.mktemp("project"))
    with ThreadPoolExecutor() as pool:
        outputs = pool.map(project.make, ["-j2", "-j2"], ["reproduce", "reproduce"])
    assert sorted(name for output in outputs for name in started(output)) == ["10_map", "20_figure", "30_apart"]
    return project


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_everything_is_published_and_recorded(made: Project) -> None:
    for output in ("results/map.csv", "figures/damage.png", "results/apart.json", "paper/numbers.tex"):
        assert (made.root / output).is_file()
    assert (made.root / "build/notebooks/paper/20_figure.ipynb").is_file()
    assert not list((made.root / "build/staging/paper").iterdir())


def test_what_make_made_is_compared_with_what_is_committed(made: Project) -> None:
    assert made.make("reproduce").splitlines()[-1] == "compared: --brief"
    assert made.make("results/apart.csv").splitlines()[-1] == "compared: --brief apart"
    assert "compared" not in made.make("30_apart")


def test_a_kernel_opens_no_port(fresh: Project) -> None:
    code = "import json\nfrom ipykernel.connect import get_connection_info\nfrom cachemedic import write\n"
    code += "assert json.loads(get_connection_info())['transport'] == 'ipc'\nwrite('results/map.csv')"
    fresh.notebook("10_map", code)
    assert fresh.ran("10_map") == {"10_map"}


def test_touching_files_reruns_nothing(made: Project) -> None:
    for path in [*made.root.glob("notebooks/*"), *made.root.glob("cachemedic/*"), *made.root.glob("tools/*.py")]:
        path.touch()
    (made.root / "requirements.txt").touch()
    assert made.ran("reproduce") == set()


def test_outputs_saved_in_a_notebook_and_unused_modules_do_not_count(made: Project) -> None:
    path = made.root / "notebooks/10_map.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="seen in the lab")]
    notebook.cells[1].execution_count = 7
    nbformat.write(notebook, path)
    made.write("cachemedic/unused.py", "changed = True\n")
    assert made.ran("reproduce") == set()


def test_a_damaged_record_is_no_record(made: Project) -> None:
    record = Variant(Graph(made.root), "paper", {}).record_path("30_apart")
    content = record.read_text()
    for damaged in (content.replace("seconds", "sekonds"), content[:-9], "[]", content.replace("{", "[", 1)):
        record.write_text(damaged)
        assert made.stale("30_apart") == "not run here before"
    record.write_text(content)
    assert made.stale("30_apart") is None


def test_deleting_a_figure_reruns_its_notebook_only(made: Project) -> None:
    (made.root / "figures/damage.pdf").unlink()
    assert made.ran("figures/damage.pdf") == {"20_figure"}
    assert (made.root / "figures/damage.pdf").exists()


def test_editing_a_notebook_reruns_it_and_what_depends_on_it(made: Project) -> None:
    made.notebook("10_map", "# edited\nfrom cachemedic import write\nwrite('results/map.csv')")
    assert made.ran("reproduce") == {"10_map", "20_figure"}


def test_another_result_reruns_what_reads_it(made: Project) -> None:
    made.write("results/map.csv", "made on another day\n")
    assert made.stale("20_figure") == "changed: results/map.csv"
    made.write("results/map.csv", "made\n")


def test_reasons_to_run_are_named(made: Project) -> None:
    assert made.stale("30_apart") is None
    made.write("results/apart.csv", "forged\n")
    assert made.stale("30_apart") == "results/apart.csv is not what was made"
    made.write("results/apart.csv", "made\n")
    made.write("data/text.txt", "other words")
    assert made.stale("30_apart") == "changed: data/text.txt"
    made.write("data/text.txt", "words")
    made.notebook("20_figure", f"# edited\n{FIGURE}")
    assert made.stale("20_figure") == "changed: notebooks/20_figure.ipynb"
    assert made.stale("10_map") is None, "nothing flows back to what a notebook needs"
    made.notebook("20_figure", FIGURE)


def test_failing_cell_names_itself_and_leaves_old_outputs(made: Project) -> None:
    made.notebook("30_apart", "from cachemedic import write\nwrite('results/apart.csv')\nraise ValueError('rank 99')")
    message = made.make("30_apart", fails=True)
    assert "30_apart, cell 2, failed: ValueError: rank 99" in message
    assert (made.root / "results/apart.csv").read_text() == "made\n"
    made.notebook("30_apart", "import cachemedic.toy\ncachemedic.toy.write('results/apart.csv')")
    assert made.stale("30_apart") is None, "the old outputs are those of the old notebook"


def test_nothing_is_made_from_a_notebook_that_failed(fresh: Project) -> None:
    fresh.notebook("10_map", "1 / 0")
    message = fresh.make("reproduce", fails=True)
    assert "10_map, cell 2, failed: ZeroDivisionError: division by zero" in message
    assert "20_figure" not in started(message)
    assert not (fresh.root / "paper/numbers.tex").exists()


def test_kernels_have_fixed_threads_and_copies_no_complaint_of_progress_bars(fresh: Project) -> None:
    """Sums depend on the number of threads in the last bit; tqdm would warn that widgets are missing."""
    fresh.notebook("10_map", PROGRESS)
    fresh.make("10_map")
    copy = (fresh.root / "build/notebooks/paper/10_map.ipynb").read_text()
    assert "1/1" in copy, "the bar itself is shown"
    assert "IProgress" not in copy


def test_two_notebooks_run_at_once(fresh: Project) -> None:
    fresh.notebook("10_map", MEETING.format(own="map", other="apart", output="results/map.csv"))
    fresh.notebook("30_apart", MEETING.format(own="apart", other="map", output="results/apart.csv"))
    fresh.make("10_map", "30_apart")


def test_a_notebook_that_measures_times_runs_alone(fresh: Project) -> None:
    fresh.write("notebooks/graph.toml", TABLE + "alone = true\n")
    fresh.notebook("10_map", EXCLUSIVE.format(output="results/map.csv"))
    fresh.notebook("30_apart", EXCLUSIVE.format(output="results/apart.csv"))
    fresh.make("10_map", "30_apart")


def test_unknown_parameters_fail_before_anything_runs(made: Project) -> None:
    message = made.make("10_map", "SEEDS=[0]", fails=True)
    assert "unknown parameter of notebooks/10_map.ipynb 'seeds'" in message
    assert "allowed: profile" in message
    assert "unknown PROFILE=smok; allowed: paper, smoke" in made.make("10_map", "PROFILE=smok", fails=True)
    assert "nearest: figures/damage.pdf" in made.make("figures/damages.pdf", fails=True)


def test_a_wrong_value_fails_before_any_notebook_starts(made: Project) -> None:
    said = made.make("reproduce", "SEEDS=0,1", fails=True)
    assert "error: SEEDS=0,1: seeds must be a list of whole numbers, such as [0, 1], not '0,1'" in said
    assert not started(said)


def test_an_interrupt_is_one_line_and_leaves_old_outputs(fresh: Project) -> None:
    fresh.notebook("10_map", "import time\nprint('begun', flush=True)\ntime.sleep(600)")
    command = [sys.executable, "tools/run_notebook.py", "10_map"]
    pipe = subprocess.PIPE
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    running = subprocess.Popen(
        command, cwd=fresh.root, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, preexec_fn=heeding
    )
    assert running.stdout is not None
    for line in running.stdout:
        if "begun" in line:
            break
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=120)
    assert error.splitlines() == ["interrupted: what is finished is kept, the same command goes on from there"]
    assert not (fresh.root / "results").exists()


def test_figure_accepts_shipped_results_that_are_current(made: Project) -> None:
    """As in a fresh clone: committed files, no records. What was not asked for is trusted if its hashes agree."""
    shutil.rmtree(made.root / "build")
    assert made.ran("figures/damage.pdf") == {"20_figure"}
    assert made.stale("10_map", asked_for=False) is None
    assert made.stale("10_map") == "not run here before"
    made.write("results/map.csv", "forged\n")
    assert made.stale("10_map", asked_for=False) == "not run here before"
    made.write("results/map.csv", "made\n")


def test_smoke_and_other_parameters_are_published_apart(fresh: Project) -> None:
    fresh.notebook("10_map", "import cachemedic\ncachemedic.write('results/map.csv')", 'profile = "paper"\nbase = "a"')
    fresh.write("some/model/config.json", "{}")
    assert fresh.ran("10_map", "PROFILE=smoke", "BASE=some/model") == {"10_map"}
    assert "compared" not in fresh.make("results/map.csv", "PROFILE=smoke"), "nothing of it is committed"
    assert fresh.ran("reproduce", "PROFILE=smoke") == {"20_figure", "30_apart"}
    assert (fresh.root / "build/smoke,base=some_model/results/map.csv").is_file()
    assert not (fresh.root / "results").exists()
    assert not (fresh.root / "paper").exists()


def test_a_notebook_takes_the_parameters_that_it_has(fresh: Project) -> None:
    fresh.notebook("20_figure", f"assert family == 'E'\n{FIGURE}", 'profile = "paper"\nfamily = "A"')
    assert fresh.ran("20_figure", "FAMILY=E", "PROFILE=smoke") == {"10_map", "20_figure"}
    assert (fresh.root / "build/smoke,family=E/results/map.csv").is_file()
    message = fresh.make("20_figure", "FAMILY=E", "OBJECTIVE=valence", fails=True)
    assert "unknown parameter of notebooks/20_figure.ipynb 'objective'" in message
    message = fresh.make("10_map", "FAMILY=E", fails=True)
    assert "'family'; allowed: profile; family is a parameter of 20_figure" in message


def test_undeclared_outputs_are_refused(fresh: Project) -> None:
    fresh.notebook("10_map", "import cachemedic\ncachemedic.write('results/other.csv')")
    message = fresh.make("10_map", fails=True)
    assert "missing: results/map.csv" in message
    assert "not in the table: results/other.csv" in message


def test_parameters_cell_is_required(fresh: Project) -> None:
    fresh.notebook("10_map", "1", tag="other")
    assert "needs one cell with the tag `parameters`, it has 0" in fresh.make("10_map", fails=True)


def test_retraining_runs_again_once(made: Project) -> None:
    assert made.stale("20_figure", retrain=True) == "operators are to be trained anew"
    assert made.ran("30_apart", "RETRAIN=1") == {"30_apart"}
    assert made.stale("30_apart", retrain=True) is None


def test_set_up_is_repeated_until_it_succeeds(fresh: Project) -> None:
    """`make test` with a python that only notes what is asked of pip; its first installation is interrupted."""
    installer = fresh.root / "installer"
    stand_in(installer, f"""
        case "$*" in
        "-m venv "*) mkdir -p "$3/bin"; ln -sf {installer} "$3/bin/python" ;;
        *pip*) echo "$@" >> {fresh.root}/log; test -e {fresh.root}/net ;;
        tools/*) exec {sys.executable} "$@" ;;
        esac
    """)  # fmt: skip

    def installations(fails: bool = False) -> int:
        (fresh.root / "log").write_text("")
        run_make(fresh.root, "test", f"PYTHON={installer}", fails=fails)
        return (fresh.root / "log").read_text().count("requirements.txt")

    assert installations(fails=True) == 1
    fresh.write("net", "")
    assert installations() == 1
    (fresh.root / "requirements.txt").touch()
    assert installations() == 0
    fresh.write("requirements.txt", "numpy==2.4.6\n")
    assert installations() == 1
