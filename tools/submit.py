"""Runs one notebook as a job, by submitit, and waits for it; for EXECUTOR=... make calls this, not run_notebook.py.

    python tools/submit.py 03_main_results --executor slurm --cluster '{"slurm_partition": "cpu"}'

It takes the arguments of run_notebook.py. What is up to date starts no job.
"""

from __future__ import annotations

import subprocess
import sys

from graph import GraphError
from run_notebook import INTERRUPTED, NotebookFailed, options_of, reason_to_run, say, title_of, variant_of


def submit(arguments: list[str]) -> None:
    """Brings the notebook that the arguments name up to date. Raises `NotebookFailed` with what the job says."""
    import submitit

    options = options_of(arguments)
    variant = variant_of(options)
    title, root = title_of(variant, options.name), variant.graph.root
    if reason_to_run(variant, options) is None:
        say(f"{title} up to date")
        return
    command = [sys.executable, "tools/run_notebook.py", *arguments]
    alone, streams = variant.graph[options.name].alone, {"cwd": root, "stderr": subprocess.PIPE, "text": True}
    try:
        job = options.cluster.start(options.name, subprocess.run, command, alone=alone, **streams)
    except submitit.core.utils.FailedJobError as error:  # of the command that submits
        raise NotebookFailed(f"{options.name}: no job was started: {error}") from error
    printed = job.paths.stdout.relative_to(root)
    say(f"{title} job {job.job_id} ({options.cluster.executor}), prints to {printed}")
    try:
        done = job.result()
    except submitit.core.utils.UncompletedJobError as error:
        raise NotebookFailed(f"{options.name}: job {job.job_id} ended before it was done, see {printed}") from error
    except KeyboardInterrupt:
        job.cancel(check=False)
        raise
    if done.returncode:
        raise NotebookFailed(done.stderr.strip().removeprefix("error: "))
    say(f"{title} done")


if __name__ == "__main__":
    try:
        submit(sys.argv[1:])
    except (GraphError, NotebookFailed) as failure:
        sys.exit(f"error: {failure}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
