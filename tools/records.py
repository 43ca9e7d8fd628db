"""What has been made: where a profile publishes, which inputs its files were made from, and why to run again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachemedic.core.files import read_sealed
from graph import Graph, GraphError, sha256

PROFILES = ("paper", "smoke")


@dataclass(frozen=True)
class Variant:
    """A profile with the parameters that replace the notebooks' own. Only the plain paper profile is committed."""

    graph: Graph
    profile: str
    parameters: Mapping[str, Any]  # without the profile, and without the device, which says how, not what

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise GraphError(f"unknown profile {self.profile!r}; allowed: {', '.join(PROFILES)}")

    @property
    def label(self) -> str:
        changed = "".join(f",{name}={value}" for name, value in sorted(self.parameters.items()))
        return self.profile + re.sub(r"[^\w.,=-]+", "_", changed)

    @property
    def published(self) -> Path:
        """The folder that holds results/, figures/ and paper/tables/ of this variant."""
        return self.graph.root if self.label == "paper" else self.graph.root / "build" / self.label

    def work(self, name: str) -> Path:
        """Where the outputs of a running notebook wait until all of them are there."""
        return self.graph.root / "build" / "staging" / self.label / name

    def record_path(self, name: str) -> Path:
        return self.graph.root / "build" / "stamps" / self.label / f"{name}.json"

    def record(self, name: str) -> dict[str, Any]:
        """What is known of the last complete run on this machine; empty if there was none, or its record is damaged."""
        try:
            return read_sealed(self.record_path(name))
        except (FileNotFoundError, ValueError):
            return {}

    def stale(self, name: str, asked_for: bool = True, retrain: bool = False) -> str | None:
        """Why a notebook has to run, or None if what it would make is there, made on this machine from these inputs.

        A notebook that is merely needed by what was asked for need not have run here: its CSVs will do.
        """
        if not asked_for and self.computed(name):
            return None
        record, inputs = self.record(name), self.inputs(name)
        if not record:
            return "not run here before"
        if record["inputs"] != inputs or record["parameters"] != dict(self.parameters):
            changed = sorted(k for k in record["inputs"] | inputs if record["inputs"].get(k) != inputs.get(k))
            return f"changed: {', '.join(changed) or 'parameters'}"
        if retrain and not record["retrained"]:
            return "operators are to be trained anew"
        outputs = self.graph[name].outputs
        for output in outputs:
            if not (self.published / output).is_file():
                return f"{output} is missing"
            if record["outputs"].get(output) != sha256((self.published / output).read_bytes()):
                return f"{output} is not what was made"
        return None

    def inputs(self, name: str) -> dict[str, str]:
        """Everything the outputs of a notebook depend on, with its sha256.

        That includes the CSVs that it reads: those of another run may differ.
        """
        read = [f"results/{csv}.csv" for needed in self.graph[name].needs for csv in self.graph[needed].csv]
        there = [path for path in read if (self.published / path).is_file()]
        csvs = {path: sha256((self.published / path).read_bytes()) for path in there}
        return self.graph.inputs(name) | self.graph.page(name) | csvs

    def computed(self, name: str) -> bool:
        """Whether the CSVs of a notebook are there, made from what they depend on now: drawing them takes seconds.

        Those that came with the repository count, too.
        """
        notebook = self.graph[name]
        try:
            sidecars = [read_sealed(self.published / path) for path in notebook.sidecars]
            made = [sha256((self.published / sidecar["file"]).read_bytes()) for sidecar in sidecars]
        except (FileNotFoundError, ValueError):  # missing, or damaged
            return False
        recorded = [sidecar["sha256"] for sidecar in sidecars]
        current = all(sidecar["inputs"] == self.graph.inputs(name) for sidecar in sidecars)
        return bool(made) and made == recorded and current

    def minutes(self, name: str) -> float:
        """How long a notebook takes: seconds if it only draws, else as long as last time, or as the table says."""
        if self.computed(name):
            return 0.1
        seconds = self.record(name).get("seconds")
        return seconds / 60 if seconds else self.graph[name].minutes.get(self.profile, 1.0)
