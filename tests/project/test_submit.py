"""Notebooks as jobs: on this machine, and on a Slurm whose commands are stand-ins that run what they are given."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_project import ENVIRONMENT, TABLE, Project, stand_in

from cachemedic.studies.jobs import Cluster, check_options

SLURM = {
    "sbatch": """
        cat "$1" >> {root}/submitted
        cp "$1" {root}/spooled  # as Slurm does: submitit renames its file at once
        export SLURM_JOB_ID=$$
        (sh {root}/spooled > {root}/build/jobs/$$_0_log.out 2>&1; touch {root}/ended) > /dev/null 2>&1 &
        echo "Submitted batch job $$"
    """,
    "sacct": """
        for job; do :; done  # the last argument
        echo "JobID|State|NodeList"
        test -e {root}/ended && echo "$job|COMPLETED|here" || echo "$job|RUNNING|here"
    """,
    "srun": "exit 1",  # found, but jobs do not use it
}


def submitted(output: str) -> set[str]:
    """The notebooks for which make started a job."""
    return {line.split()[0] for line in output.splitlines() if "]: job " in line}


def submit(project: Project, name: str, executor: str = "local", *options: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a notebook as a job."""
    command = [sys.executable, "tools/submit.py", name, "--executor", executor, *options]
    done = subprocess.run(command, cwd=project.root, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_notebooks_run_as_jobs_of_this_machine(project: Project) -> None:
    said = project.make("reproduce", "EXECUTOR=local")
    assert submitted(said) == {"10_map", "20_figure", "30_apart"}
    assert "compared" in said, "as without jobs"
    logs = [path.read_text() for path in (project.root / "build/jobs").glob("*_log.out")]
    assert sum("20_figure [paper]: running (not run here before)" in log for log in logs) == 1
    assert submit(project, "10_map") == (0, "10_map [paper]: up to date\n", ""), "that starts no job"
    project.notebook("30_apart", "1 / 0")
    status, _, error = submit(project, "30_apart")
    assert (status, error.splitlines()[0]) == (
        1,
        "error: 30_apart, cell 2, failed: ZeroDivisionError: division by zero",
    )
    assert "Traceback" not in error


def test_slurm_gets_the_options_and_runs_the_notebook(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in SLURM.items():
        stand_in(project.root / "bin" / name, code.format(root=project.root))
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{project.root}/bin:{os.environ['PATH']}")
    project.write("notebooks/graph.toml", TABLE + "alone = true\n")
    given = {"slurm_partition": "night", "timeout_min": 90, "slurm_additional_parameters": {"licenses": "a"}}
    status, said, error = submit(project, "30_apart", "slurm", "--cluster", json.dumps(given))
    assert (status, error) == (0, "")
    assert said.splitlines()[-1] == "30_apart [paper]: done"
    assert (project.root / "results/apart.csv").exists()
    options = (project.root / "submitted").read_text().splitlines()
    for option in ("partition=night", "time=90", "licenses=a", "cpus-per-task=1", "mem=8GB", "job-name=30_apart"):
        assert f"#SBATCH --{option}" in options
    assert "#SBATCH --exclusive" in options, "it measures times"
    stand_in(project.root / "bin/sbatch", "echo 'invalid partition: night' >&2\nexit 1")
    refused = "error: 10_map: no job was started: invalid partition: night\n"
    assert submit(project, "10_map", "slurm")[::2] == (1, refused)


def test_a_job_that_is_ended_is_one_line(project: Project) -> None:
    project.notebook("10_map", "import psutil\nkernel = psutil.Process()\nkernel.parent().parent().kill()")
    status, _, error = submit(project, "10_map")
    assert status == 1
    assert re.fullmatch(r"error: 10_map: job \d+ ended before it was done, see build/jobs/\d+_0_log.out\n", error)


def test_an_interrupt_is_one_line_and_ends_the_job(project: Project) -> None:
    project.notebook("10_map", "import os, pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(600)")
    running = subprocess.Popen(
        [sys.executable, "tools/submit.py", "10_map", "--executor", "local"],
        cwd=project.root, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (project.root / "begun").exists():
        assert running.poll() is None
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    _, error = running.communicate(timeout=120)
    assert error.splitlines() == ["interrupted: what is finished is kept, the same command goes on from there"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "must be an object in JSON"),
        ({"pbs_queue": "a"}, "Unknown executor 'pbs'"),
        ({"slurm_partitoin": "a"}, "Unknown argument 'partitoin' for executor 'slurm'"),
        ({"timeout_min": "long"}, "expected type"),
    ],
)
def test_what_submitit_does_not_take_is_named(given: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_options(given)


def test_results_come_in_order_and_a_failure_is_told(tmp_path: Path) -> None:
    cluster = Cluster("local", tmp_path, {"timeout_min": 5})
    assert cluster.run((f"sum {n}", sum, ([n, 1],)) for n in range(3)) == [1, 2, 3]
    with pytest.raises(Exception, match="ZeroDivisionError"):
        cluster.run([("fails", divmod, (1, 0)), ("waits", subprocess.run, (["sleep", "60"],))])
