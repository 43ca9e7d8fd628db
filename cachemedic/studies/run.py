"""What a study is run with and what it leaves: parameters, folders, and CSVs with what they were made from.

run = Run("paper", base="embedded-gpt2", device="cpu", seeds=[0, 1, 2, 3, 4])
run.results("rank")   # the CSVs of cachemedic.studies.computing.rank: read if they are current, else computed
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cachemedic.core.files import read_sealed, seal, write_atomically
from cachemedic.studies.jobs import Cluster
from cachemedic.studies.result_files import read_result

ROOT = Path(__file__).resolve().parents[2]
# What runs write to.
MADE = ("results", "figures", "paper", "trained", "cachemedic/corruption/severity_map.csv")
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pandas", "matplotlib")


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _commit() -> str | None:
    """The commit of the checkout, with `-dirty` if files differ from it but for what runs make; None outside of git."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    sources = [".", *(f":!{path}" for path in MADE)]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources], check=False).returncode
    return done.stdout.strip() + "-dirty" * bool(changed)


def _package() -> dict[str, str]:
    """The modules of this package with their sha256: outside of make nothing says which of them count."""
    modules = sorted((ROOT / "cachemedic").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in modules}


def _ask_for(study: str) -> dict[str, Any]:
    """What make would say of a study: its CSVs and what these depend on. Raises `ValueError` for an unknown one."""
    command = [sys.executable, str(ROOT / "tools" / "graph.py"), "study", study]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return json.loads(done.stdout)


def _without_device(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The device says where something is computed, not what."""
    return {name: value for name, value in parameters.items() if name != "device"}


class Run:
    """One run of a notebook or a benchmark: where its files go and what they were made from.

    Run by make, files wait in a folder apart until the notebook has succeeded; run by hand, in JupyterLab, they go to
    build/lab, and committed results stay as they are.

    profile: "paper" or "smoke"; folder: where files go if make does not say (a benchmark is no notebook); parameters:
    those of the notebook, recorded beside every CSV.
    """

    def __init__(self, profile: str, folder: Path = ROOT / "build" / "lab", **parameters: Any) -> None:
        if profile not in ("paper", "smoke"):
            raise ValueError(f"unknown profile {profile!r}; allowed: paper, smoke")
        self.started = time.perf_counter()
        self.parameters = {"profile": profile, **parameters}
        given = os.environ.get("CACHEMEDIC_RUN")
        context = json.loads(Path(given).read_text()) if given else {}
        self._study: dict[str, Any] | None = context or None
        self.notebook: str | None = context.get("notebook")
        self.inputs: dict[str, str] | None = context.get("inputs")
        self.threads: int | None = context.get("threads")
        self.retrain: bool = context.get("retrain", False)
        executor, options = context.get("cluster") or (None, {})
        self.cluster = Cluster(executor, ROOT / "build" / "jobs", options) if executor else None
        self.folder = Path(context.get("work", folder))
        self.published = Path(context.get("published", ROOT if profile == "paper" else ROOT / "build" / profile))
        self._unkept: tempfile.TemporaryDirectory[str] | None = None

    @property
    def smoke(self) -> bool:
        """Whether everything is small, to see that it works; operators are trained then, as none are shipped."""
        return self.parameters["profile"] == "smoke"

    @property
    def config_hash(self) -> str:
        """Names the notebook's parameters; the device is left out, as it says where and not what."""
        return config_hash(_without_device(self.parameters) | {"notebook": self.notebook})

    @property
    def trained(self) -> Path:
        """The folder of this profile's trained operators, which outlive a run; the paper profile's are committed."""
        return self.published / "trained"

    @property
    def work(self) -> Path:
        """Checkpoints and logs of training in progress; they outlive an interrupted run."""
        return ROOT / "build" / "training" / self.parameters["profile"]

    @property
    def partial(self) -> Path:
        """Where finished parts of this run's grids are kept until it ends, named by everything they depend on.

        By hand, outside of make, code may have changed under way: then a folder that goes with the run.
        """
        if self.inputs is not None:
            return ROOT / "build" / "partial" / config_hash({"parameters": self.parameters, "inputs": self.inputs})
        if self._unkept is None:
            self._unkept = tempfile.TemporaryDirectory(prefix="cachemedic-")
        return Path(self._unkept.name)

    def results(self, study: str, **given: Any) -> dict[str, pd.DataFrame]:
        """The CSVs of a study, by name; `given`: what it takes besides this run, of which the parameters have a record.

        They are read if they were made from the code, the data and the parameters of now. Else function `results` of
        module cachemedic.studies.computing.STUDY computes them from this run, and they are written.
        """
        made = self._study or _ask_for(study)
        if study != made["study"]:
            raise ValueError(f"the study of {self.notebook} is {made['study']!r}, not {study!r}")
        stored = {name: self.published / "results" / f"{name}.csv" for name in made["csv"]}
        if not self.retrain and all(self._current(path, made["inputs"]) for path in stored.values()):
            if self._study:  # make publishes what is in the folder of the run, and nothing else
                for path in (path.with_suffix(suffix) for path in stored.values() for suffix in (".csv", ".json")):
                    write_atomically(self.folder / "results" / path.name, path.read_bytes())
            return {name: pd.read_csv(path) for name, path in stored.items()}
        # The module is loaded here only: it brings torch with it, which a page that draws what is there can spare.
        frames = importlib.import_module(f"cachemedic.studies.computing.{study}").results(self, **given)
        if set(frames) != set(stored):
            raise ValueError(f"study {study} made {sorted(frames)}, notebooks/graph.toml says {sorted(stored)}")
        for name, frame in frames.items():
            self.write_csv(frame, name)
        return {name: self.read_csv(name) for name in stored}  # rounded, as they are when they are drawn again

    def _current(self, path: Path, inputs: Mapping[str, str]) -> bool:
        """Whether a CSV is what its sidecar records, made from `inputs` and the parameters of this run."""
        try:
            sidecar = read_sealed(path.with_suffix(".json"))
            same = sidecar["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        except (FileNotFoundError, ValueError):  # missing, or damaged
            return False
        parameters = _without_device(sidecar["parameters"])
        return same and sidecar["inputs"] == inputs and parameters == _without_device(self.parameters)

    def read_csv(self, name: str) -> pd.DataFrame:
        """A CSV of this notebook, or of one that it needs, in the same profile."""
        places = [folder / "results" / f"{name}.csv" for folder in (self.folder, self.published)]
        for path in places:
            if path.exists():
                return read_result(path)
        raise FileNotFoundError(f"{places[-1]} does not exist; `make results/{name}.csv` of this profile makes it")

    def write_csv(self, frame: pd.DataFrame, name: str) -> pd.DataFrame:
        """Writes results/NAME.csv (eight digits, LF) and its sidecar; returns the frame as written.

        Rows without a `config_hash` of their own get that of the notebook's parameters. Wall time and versions are in
        the sidecar only, so that equal results are equal bytes.
        """
        if "config_hash" not in frame:
            frame = frame.assign(config_hash=self.config_hash)
        data = frame.to_csv(index=False, float_format="%.8g", lineterminator="\n").encode()
        write_atomically(self.folder / "results" / f"{name}.csv", data)
        sidecar = {
            "file": f"results/{name}.csv",
            "sha256": hashlib.sha256(data).hexdigest(),
            "rows": len(frame),
            "notebook": self.notebook,
            "parameters": self.parameters,
            "commit": _commit(),
            "inputs": self.inputs or _package(),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
            "machine": platform.machine(),
            "threads": self.threads,
            "wall_seconds": round(time.perf_counter() - self.started, 1),
        }
        write_atomically(self.folder / "results" / f"{name}.json", seal(sidecar))
        return frame

    def _write_text(self, path: str, text: str) -> None:
        write_atomically(self.folder / path, text.encode())
