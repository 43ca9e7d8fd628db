"""Runs one notebook by papermill if what it makes is out of date; make calls this once per notebook.

    python tools/run_notebook.py 03_main_results --profile smoke

Outputs are written to a folder apart and published together when the last cell has succeeded: a failing notebook leaves
the old files in place. The executed copy goes to build/notebooks/.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, ReadWriteLock

from cachemedic.core.files import seal, write_atomically
from cachemedic.studies.jobs import AT_ONCE, Cluster
from graph import ROOT, Graph, GraphError, sha256, unknown
from records import PROFILES, Variant

FREE_DISK = 1 << 30  # bytes; a run writes far less, but torch and Jupyter write temporary files too
INTERRUPTED = "interrupted: what is finished is kept, the same command goes on from there"
THREADS = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"


class NotebookFailed(RuntimeError):
    """A cell raised, the kernel died, or the notebook made other files than the table says."""


def parameter_names(graph: Graph, name: str) -> list[str]:
    """The names assigned in the cell tagged `parameters`; `GraphError` if there is not exactly one such cell."""
    tagged = [c for c in graph.cells(name) if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise GraphError(f"notebooks/{name}.ipynb needs one cell with the tag `parameters`, it has {len(tagged)}")
    body = ast.parse("".join(tagged[0]["source"])).body
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def turn(path: Path) -> AbstractContextManager[Any]:
    """Holds a lock that one process has at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def place_on_the_machine(root: Path, alone: bool) -> AbstractContextManager[Any]:
    """Notebooks that measure times run alone, all others beside one another."""
    path = root / "build" / "stamps" / f"{platform.node()}.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = ReadWriteLock(path)
    return lock.write_lock() if alone else lock.read_lock()


def execute(variant: Variant, name: str, parameters: dict[str, Any], options: argparse.Namespace) -> None:
    """Runs all cells in a fresh kernel; the outputs end up in `variant.work(name)`."""
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]  # else jsonschema takes a second to parse its grammar
    import papermill  # slow, and not needed to find that nothing is to be done
    from traitlets.config import Config

    root, work = variant.graph.root, variant.work(name)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    context = {
        "notebook": name,
        "study": variant.graph[name].study,
        "csv": variant.graph[name].csv,
        "work": str(work),
        "published": str(variant.published),
        "inputs": variant.graph.inputs(name),
        "threads": options.threads,
        "retrain": options.retrain,
        "cluster": options.cluster and [options.cluster.executor, options.cluster.options],
    }
    (work / "run.json").write_text(json.dumps(context))
    os.environ |= dict.fromkeys(THREADS, str(options.threads))  # sums depend on the number of threads in the last bit
    os.environ |= {
        "CACHEMEDIC_RUN": str(work / "run.json"),
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(root), os.environ.get("PYTHONPATH")))
        ),  # this checkout's package
        "PYTHONHASHSEED": "0",
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not one of the user's
        "TQDM_MININTERVAL": "15",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm asks for widgets, which an executed copy cannot show
    }
    copy = root / "build" / "notebooks" / variant.label / f"{name}.ipynb"
    copy.parent.mkdir(parents=True, exist_ok=True)
    sockets = tempfile.TemporaryDirectory(prefix="cachemedic-")  # two kernels that start at once may draw one port
    transport = {"transport": "ipc", "ip": f"{sockets.name}/kernel"}
    try:
        with sockets:
            papermill.execute_notebook(
                variant.graph.path(name), copy, parameters=parameters, kernel_name="python3", language="python",
                cwd=root, log_output=True, progress_bar=False, start_timeout=300,
                config=Config(KernelManager=transport),
                extra_arguments=["--log-level=CRITICAL"],  # of the kernel: what fails in a cell is told below
            )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        # papermill adds cells: count in the notebook as it is
        sources = ["".join(cell["source"]) for cell in variant.graph.cells(name)]
        place = f"{name}, cell {sources.index(error.source) + 1}, failed: {error.ename}: {error.evalue}"
        raise NotebookFailed(f"{place}\n  executed copy: {copy.relative_to(root)}") from None
    except RuntimeError as error:  # from nbclient: the kernel did not start, or was ended, mostly for want of memory
        raise NotebookFailed(f"{name} stopped: {error}\n  executed copy: {copy.relative_to(root)}") from None


def publish(variant: Variant, name: str) -> dict[str, str]:
    """Moves the outputs of a complete run to where they belong; returns the sha256 of each."""
    work, expected = variant.work(name), set(variant.graph[name].outputs)
    made = {p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file()} - {"run.json"}
    if made != expected:
        differences = [f"missing: {path}" for path in sorted(expected - made)]
        differences += [f"not in the table: {path}" for path in sorted(made - expected)]
        raise NotebookFailed(f"{name} made other files than notebooks/graph.toml says; {'; '.join(differences)}")
    variant.record_path(name).unlink(missing_ok=True)
    waiting = {}
    for output in sorted(expected):
        target = variant.published / output
        target.parent.mkdir(parents=True, exist_ok=True)
        waiting[target] = target.with_name(f".{target.name}.new")
        shutil.copyfile(work / output, waiting[target])
    for target, temporary in waiting.items():
        temporary.replace(target)
    hashes = {output: sha256((work / output).read_bytes()) for output in expected}
    shutil.rmtree(work)
    return hashes


def taken(graph: Graph, name: str, goals: Collection[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `given` parameters that a notebook has: what was asked for may need others, without all of them.

    papermill only warns of a parameter that the notebook does not know; one that no goal knows is an error here.
    """
    known = {goal: parameter_names(graph, goal) for goal in {name, *goals}}
    of_goals = sorted({parameter for goal in goals or [name] for parameter in known[goal]})
    for parameter in given:
        if parameter not in of_goals:
            where = f"notebooks/{next(iter(goals), name)}.ipynb" if len(goals) < 2 else "the notebooks asked for"
            takers = [other for other in graph.notebooks if parameter in parameter_names(graph, other)]
            taken_by = f"; {parameter} is a parameter of {', '.join(takers)}" if takers else ""
            raise GraphError(f"{unknown(f'parameter of {where}', parameter, of_goals)}{taken_by}")
    return {parameter: value for parameter, value in given.items() if parameter in known[name]}


def say(line: str) -> None:
    """Prints in one piece, so that lines of parallel notebooks stay whole."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def at_once() -> int:
    """How many notebooks make runs at once."""
    found = re.search(r"-j ?(\d+)|--jobs=(\d+)", os.environ.get("MAKEFLAGS", ""))
    return int(found[1] or found[2]) if found else 1


def announcement(variant: Variant, name: str, reason: str, goals: list[str]) -> str:
    """One line: what runs, why, about how long, and what is left after it."""
    others = [other for other in variant.graph.upstream(goals) if other != name]
    left = [other for other in others if variant.stale(other, other in goals)]
    minutes = sum(map(variant.minutes, left)) / at_once()
    after = f"; beside or after it {len(left)} more, about {minutes:.0f} min" if left else ""
    return f"running ({reason}), about {variant.minutes(name):.0f} min{after}"


def title_of(variant: Variant, name: str) -> str:
    """What lines about a notebook begin with."""
    return f"{name} [{variant.label}]:"


def goals_of(variant: Variant, options: argparse.Namespace) -> list[str]:
    """The notebooks that make was asked for."""
    return variant.graph.goals(options.goals or [options.name])


def reason_to_run(variant: Variant, options: argparse.Namespace) -> str | None:
    """Why the notebook has to run, or None if what it makes is there already."""
    return variant.stale(options.name, options.name in goals_of(variant, options), options.retrain)


def bring_up_to_date(variant: Variant, options: argparse.Namespace) -> None:
    """Runs the notebook that the options name unless what it makes is there already."""
    graph, name = variant.graph, options.name
    parameters = {"profile": variant.profile, **variant.parameters}
    parameters |= {"device": options.device} if options.device else {}
    parameters = taken(graph, name, goals_of(variant, options), parameters)
    title = title_of(variant, name)
    with turn(variant.record_path(name).with_suffix(".lock")):  # two makes in one checkout take turns
        reason = reason_to_run(variant, options)
        if reason is None:
            say(f"{title} up to date")
            return
        free = shutil.disk_usage(graph.root).free
        if free < FREE_DISK:
            raise GraphError(f"{free >> 20} MB of disk space are free, {FREE_DISK >> 20} MB are needed")
        with place_on_the_machine(graph.root, graph[name].alone):
            say(f"{title} {announcement(variant, name, reason, goals_of(variant, options))}")
            inputs, started = variant.inputs(name), time.monotonic()
            only_draws = variant.computed(name) and not options.retrain
            before = variant.record(name).get("seconds")
            execute(variant, name, parameters, options)
            hashes, seconds = publish(variant, name), round(time.monotonic() - started, 1)
        record = {"inputs": inputs, "parameters": dict(variant.parameters), "retrained": options.retrain}
        record |= {"outputs": hashes, "seconds": before if only_draws else seconds}  # those that computing takes
        write_atomically(variant.record_path(name), seal(record))
        say(f"{title} done in {seconds / 60:.1f} min")


def parameter(assignment: str) -> tuple[str, Any]:
    """`NAME=VALUE` from the command line; a value that is not JSON is text."""
    name, _, value = assignment.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def variant_of(options: argparse.Namespace) -> Variant:
    """What the options ask for: a profile and parameters."""
    return Variant(Graph(), options.profile, dict(options.parameter))


def options_of(arguments: list[str]) -> argparse.Namespace:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("name", help="a notebook, without folder and suffix")
    option("--profile", default="paper", choices=PROFILES)
    option("--parameter", action="append", default=[], type=parameter, metavar="NAME=VALUE", help="in JSON or text")
    option("--device", help="cpu or cuda; where to compute, not part of what is computed")
    option("--threads", type=int, default=1, help="fixed, as sums depend on it in the last bit")
    option("--retrain", action="store_true", help="train operators that the repository ships, too")
    option("--executor", choices=AT_ONCE, help="train what a notebook trains as jobs, by submitit")
    option("--cluster", default={}, type=json.loads, help="options of these jobs, an object in JSON")
    option("--goals", nargs="*", help="the targets given to make: notebooks that these only need may stay as shipped")
    options = parser.parse_args(arguments)
    given = {"gpus_per_node": int(options.device not in (None, "cpu"))} | options.cluster
    options.cluster = Cluster(options.executor, ROOT / "build" / "jobs", given) if options.executor else None
    return options


def main() -> None:
    options = options_of(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format=f"[{options.name}] %(message)s", stream=sys.stdout)
    bring_up_to_date(variant_of(options), options)


if __name__ == "__main__":
    try:
        main()
    except (GraphError, NotebookFailed, OSError) as failure:
        sys.exit(f"error: {failure}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
