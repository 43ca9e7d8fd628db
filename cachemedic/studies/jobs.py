"""Jobs on a cluster, or beside one another on this machine, by submitit: how they are started and waited for.

Function, arguments and result of a job, and what it prints, are files in build/jobs, which all machines have to see.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit import Job

# How many jobs a caller has at once. Slurm keeps those waiting that find no room; here they would take the memory.
AT_ONCE = {"slurm": 64, "local": 2}
DEFAULTS = {"timeout_min": 24 * 60, "mem_gb": 8, "cpus_per_task": 1, "slurm_use_srun": False}  # a job may start jobs


@dataclass(frozen=True)
class Cluster:
    """Where jobs run, and with what.

    executor: one of `AT_ONCE`; folder: for their files; options: parameters of `submitit.AutoExecutor`, which replace
    the `DEFAULTS`, as in `{"timeout_min": 600, "slurm_partition": "gpu", "gpus_per_node": 1}`.
    """

    executor: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def start(self, name: str, function: Callable[..., Any], *given: Any, alone: bool = False, **named: Any) -> Job:
        """Submits a call of `function` under a name; `alone`: on a machine of its own (Slurm only)."""
        import submitit  # only where jobs are asked for

        self.folder.mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(self.folder, cluster=self.executor)
        executor.update_parameters(**{**DEFAULTS, "name": name, "slurm_exclusive": alone or None, **self.options})
        with _errors_apart(self.folder / "controllers.log"):
            return executor.submit(function, *given, **named)

    def run(self, calls: Iterable[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
        """The results of calls, each a name, a function and its arguments, in their order.

        Raises what submitit raises for the first that fails; those that are not finished then are cancelled.
        """
        jobs: list[Job] = []
        try:
            for name, function, given in calls:
                if len(jobs) >= AT_ONCE[self.executor]:
                    jobs[-AT_ONCE[self.executor]].wait()
                jobs.append(self.start(name, function, *given))
            return [job.result() for job in jobs]
        except BaseException:
            for job in jobs:
                if not job.done():
                    job.cancel(check=False)
            raise


@contextmanager
def _errors_apart(log: Path) -> Iterator[None]:
    """Errors of processes that begin within go to a file: what watches a local job prints where it was interrupted."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def check_options(given: Any) -> None:
    """Raises `TypeError` or `ValueError` for what submitit does not take as options of its jobs."""
    import submitit

    if not isinstance(given, dict):
        raise TypeError(f'must be an object in JSON, such as {{"slurm_partition": "gpu"}}, not {given!r}')
    try:
        submitit.AutoExecutor("unused", cluster="debug").update_parameters(**given)
    except (NameError, AssertionError) as error:
        raise ValueError(str(error).partition("\nKnown executors")[0]) from error
