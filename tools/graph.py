"""Which notebook makes what, and from what: the table `notebooks/graph.toml` and content hashes.

    python3 tools/graph.py rules             # the table as rules for make
    python3 tools/graph.py explain TARGET    # why TARGET cannot be made
    python3 tools/graph.py study rank        # its CSVs and what these depend on, as JSON

What NN_NAME.ipynb computes stands in a module of its own, its study, cachemedic/studies/computing/NAME.py:
its CSVs depend on that, its figures and tables on the notebook as well. A notebook without a study computes itself.

Make decides by file times; here contents decide, so that touching a file reruns nothing. Only the standard library is
used: make calls this before anything is installed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036  (make may find any python3)
    sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; name another by make PYTHON=...")

import tomllib

from imports import Modules

ROOT = Path(__file__).resolve().parents[1]
STUDIES = "cachemedic.studies.computing"


class GraphError(ValueError):
    """The table, a name or a notebook is wrong; the message says what is allowed."""


def unknown(kind: str, name: str, allowed: Collection[str]) -> GraphError:
    nearest = difflib.get_close_matches(name, allowed, 1)
    hint = f" (nearest: {nearest[0]})" if nearest else ""
    return GraphError(f"unknown {kind} {name!r}{hint}; allowed: {', '.join(allowed) or 'none'}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Notebook:
    """One row of the table. Names are without folder and suffix; `data` are globs, `minutes` are by profile.

    `alone`: nothing else may run beside it, as it measures times. `apart`: `make reproduce` leaves it out.
    """

    name: str
    needs: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    csv: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    minutes: dict[str, float] = field(default_factory=dict)
    alone: bool = False
    apart: bool = False

    @property
    def study(self) -> str:
        """What its study would be called; not every notebook has one."""
        return self.name.partition("_")[2]

    @property
    def sidecars(self) -> tuple[str, ...]:
        return tuple(f"results/{name}.json" for name in self.csv)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The files this notebook makes, relative to where its profile publishes."""
        figures = (f"figures/{name}.{suffix}" for name in self.figures for suffix in ("pdf", "png"))
        tables = (f"paper/tables/{name}.tex" for name in self.tables)
        return (*(f"results/{name}.csv" for name in self.csv), *self.sidecars, *figures, *tables)


class Graph:
    """All notebooks of the repository at `root`, in an order in which each comes after what it needs.

    Raises `GraphError` unless fields and names are known, nothing needs itself and every output has one maker.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._modules = Modules(root / "cachemedic")
        self._inputs: dict[str, dict[str, str]] = {}
        try:
            rows = tomllib.loads((root / "notebooks" / "graph.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GraphError(f"notebooks/graph.toml is missing or damaged: {error}") from error
        fields = list(Notebook.__dataclass_fields__)[1:]
        makers: dict[str, str] = {}
        notebooks = {}
        for name, row in rows.items():
            if not isinstance(row, dict):
                raise GraphError(f"notebooks/graph.toml is damaged: {name} is no table")
            for key in set(row) - set(fields):
                raise unknown(f"key of [{name}] in notebooks/graph.toml", key, fields)
            for key, value in row.items():
                kind: type = {"minutes": dict, "alone": bool, "apart": bool}.get(key, list)
                if not isinstance(value, kind) or (
                    isinstance(value, list) and not all(isinstance(v, str) for v in value)
                ):
                    raise GraphError(f"{key} of [{name}] in notebooks/graph.toml is {value!r}, no {kind.__name__}")
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
            notebooks[name] = notebook = Notebook(name, **values)
            for output in notebook.outputs:
                if makers.setdefault(output, name) != name:
                    raise GraphError(f"{output} is made twice, by {makers[output]} and by {name}")
        self.notebooks = {name: notebooks[name] for name in _ordered(notebooks)}

    def __getitem__(self, name: str) -> Notebook:
        if name not in self.notebooks:
            raise unknown("notebook", name, self.notebooks)
        return self.notebooks[name]

    def upstream(self, names: Collection[str]) -> list[str]:
        """`names` and everything they need, in running order."""
        wanted = set(names)
        for name in reversed(self.notebooks):
            if name in wanted:
                wanted.update(self[name].needs)
        return [name for name in self.notebooks if name in wanted]

    def goals(self, targets: Collection[str]) -> list[str]:
        """The notebooks that a make command line asks for by name, by one of their outputs, or all but those apart."""
        everything, named = "reproduce" in targets, set(targets)
        return [
            n for n, book in self.notebooks.items() if (everything and not book.apart) or {n, *book.outputs} & named
        ]

    def path(self, name: str) -> Path:
        return self.root / "notebooks" / f"{name}.ipynb"

    def cells(self, name: str) -> list[dict]:
        """The cells of a notebook. Raises `GraphError` if the file is missing or damaged."""
        try:
            return json.loads(self.path(name).read_text(encoding="utf-8"))["cells"]
        except FileNotFoundError:
            raise GraphError(f"notebooks/graph.toml names {name}, but notebooks/{name}.ipynb does not exist") from None
        except (ValueError, KeyError) as error:
            raise GraphError(f"notebooks/{name}.ipynb is not a notebook: {error!r}") from None

    def inputs(self, name: str) -> dict[str, str]:
        """Everything the CSVs of a notebook depend on, with its sha256.

        The study with the modules of the package that it imports, also indirectly, the data files, and the notebooks
        it needs. Without a study, the notebook itself and the modules that it imports.
        """
        if name not in self._inputs:
            notebook = self[name]
            study = self._modules.files.get(f"{STUDIES}.{notebook.study}")
            found = self._code(f"import {STUDIES}.{notebook.study}", name) if study else self.page(name)
            for pattern in notebook.data:
                matches = [path for path in self.root.glob(pattern) if path.is_file()]
                if not matches:
                    raise GraphError(f"data of [{name}] in notebooks/graph.toml: no file matches {pattern!r}")
                found |= self._hashes(matches)
            for needed in notebook.needs:
                found[needed] = sha256(json.dumps(self.inputs(needed), sort_keys=True).encode())
            self._inputs[name] = found
        return self._inputs[name]

    def page(self, name: str) -> dict[str, str]:
        """What draws and prints the results of a notebook, with its sha256: its sources and the modules it imports."""
        own = f"notebooks/{name}.ipynb"
        sources = [[cell["cell_type"], "".join(cell["source"])] for cell in self.cells(name)]
        code = _without_magics([code for kind, code in sources if kind == "code"])
        return {own: sha256(json.dumps(sources).encode())} | self._code(code, own)

    def of_study(self, study: str) -> Notebook:
        """The notebook that shows a study."""
        named = {notebook.study: notebook for notebook in self.notebooks.values()}
        if study not in named:
            raise unknown("study", study, named)
        return named[study]

    def _code(self, code: str, name: str) -> dict[str, str]:
        try:
            return self._hashes(self._modules.used_by(code, name))
        except SyntaxError as error:
            raise GraphError(f"{error.filename}, line {error.lineno}: {error.msg}") from None

    def _hashes(self, files: Iterable[Path]) -> dict[str, str]:
        return {path.relative_to(self.root).as_posix(): sha256(path.read_bytes()) for path in sorted(files)}


def _ordered(notebooks: dict[str, Notebook]) -> Iterator[str]:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> Iterator[str]:
        if name in path:
            raise GraphError(f"notebooks need each other in a circle: {' -> '.join((*path, name))}")
        if name in done:
            return
        done.add(name)
        for needed in notebooks[name].needs:
            if needed not in notebooks:
                raise unknown(f"notebook needed by [{name}] in notebooks/graph.toml", needed, notebooks)
            yield from visit(needed, (*path, name))
        yield name

    for name in notebooks:
        yield from visit(name, ())


def _without_magics(cells: list[str]) -> str:
    lines = "\n".join(cells).splitlines()
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def rules(graph: Graph) -> str:
    """The table for make: `NOTEBOOKS` and those `APART`, which needs which, and which output comes from which."""
    books = graph.notebooks.items()
    lines = [f"NOTEBOOKS := {' '.join(name for name, book in books if not book.apart)}"]
    lines += [f"APART := {' '.join(name for name, book in books if book.apart)}"]
    for name, notebook in graph.notebooks.items():
        lines += [f"{name}: {' '.join(notebook.needs)}"] if notebook.needs else []
        compare = f"@$(call COMPARE,{' '.join(notebook.csv)})" if notebook.csv else ""
        lines += [f"{' '.join(notebook.outputs)}: {name} ; {compare}"] if notebook.outputs else []
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    graph = Graph()
    if arguments == ["rules"]:
        print(rules(graph))
    elif arguments[:1] == ["explain"] and len(arguments) == 2:
        outputs = [output for notebook in graph.notebooks.values() for output in notebook.outputs]
        raise unknown("output", arguments[1], outputs)
    elif arguments[:1] == ["study"] and len(arguments) == 2:
        notebook = graph.of_study(arguments[1])
        print(json.dumps({"study": notebook.study, "csv": notebook.csv, "inputs": graph.inputs(notebook.name)}))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GraphError as error:
        sys.exit(f"error: {error}")
