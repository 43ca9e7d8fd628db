"""What a notebook writes: CSVs with provenance, figures, LaTeX tables, each in the place of its profile.

    run = Run(profile, base=base, device=device, seeds=seeds)
    run.write_csv(frame, "main_results")      # results/main_results.csv and its sidecar results/main_results.json
    run.save_figure(figure, "main_results")   # figures/main_results.pdf and .png
    run.write_table(frame, "main_results", caption="...")   # paper/tables/main_results.tex

Importing this module changes nothing; making a `Run` sets the style of figures.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from cachemedic.core.files import write_atomically
from cachemedic.studies.result_files import read_result

ROOT = Path(__file__).resolve().parents[2]
AUTHOR = "the CacheMedic++ contributors"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pandas", "matplotlib")

# Okabe and Ito's colours, which colour-blind readers tell apart, ordered so that neighbours differ in grey, too.
COLOURS = ("#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#E69F00", "#7F7F7F")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
TEXT_WIDTH = 6.5  # inches of the paper's text block

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # text stays text in the PDF
}


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `plot` for each name: colour, marker and dashes, so that lines differ in grey and in print.

    Give all figures the same sequence of names, so that a name looks the same in each. At most eight names.
    """
    if len(names) > len(COLOURS):
        raise ValueError(f"at most {len(COLOURS)} lines can be told apart, not {len(names)}; use panels")
    styles = zip(names, COLOURS, MARKERS, LINES, strict=False)
    return {name: {"color": c, "marker": m, "linestyle": dashes} for name, c, m, dashes in styles}


def _commit() -> str | None:
    """The commit of the checkout, with `-dirty` if files differ from it; None outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _package() -> dict[str, str]:
    """The modules of this package with their sha256: outside of make nothing says which of them count."""
    modules = sorted((ROOT / "cachemedic").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in modules}


class Run:
    """One run of a notebook: where its files go and what they were made from.

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
        self.notebook: str | None = context.get("notebook")
        self.inputs: dict[str, str] | None = context.get("inputs")
        self.threads: int | None = context.get("threads")
        self.retrain: bool = context.get("retrain", False)
        self.folder = Path(context.get("work", folder))
        self.published = Path(context.get("published", ROOT if profile == "paper" else ROOT / "build" / profile))
        plt.style.use(STYLE)

    @property
    def config_hash(self) -> str:
        """Names the notebook's parameters; the device is left out, as it says where and not what."""
        return config_hash({k: v for k, v in self.parameters.items() if k != "device"} | {"notebook": self.notebook})

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

        By hand, outside of make, code may have changed under way: then a new folder each time.
        """
        if self.inputs is None:
            return Path(tempfile.mkdtemp(prefix="cachemedic-"))
        return ROOT / "build" / "partial" / config_hash({"parameters": self.parameters, "inputs": self.inputs})

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
        self._write_text(f"results/{name}.json", json.dumps(sidecar, indent=2) + "\n")
        return frame

    def save_figure(self, figure: Figure, name: str) -> None:
        """Writes figures/NAME.pdf and .png, the same bytes for the same figure: no date, no program version."""
        pdf = {"Title": name, "Author": AUTHOR, "Creator": None, "Producer": None, "CreationDate": None}
        png = {"Title": name, "Author": AUTHOR, "Software": None}
        for suffix, metadata in (("pdf", pdf), ("png", png)):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=200, metadata=metadata)
            write_atomically(self.folder / "figures" / f"{name}.{suffix}", buffer.getvalue())

    def write_table(self, frame: pd.DataFrame, name: str, caption: str, digits: int = 3) -> None:
        """Writes paper/tables/NAME.tex, a booktabs table with the label `tab:NAME`.

        Text in `frame` is escaped, `caption` is LaTeX. Columns of numbers are flush right, missing values a dash.
        """
        columns = "".join("r" if pd.api.types.is_numeric_dtype(kind) else "l" for kind in frame.dtypes)
        styler = frame.style.hide(axis="index").format(precision=digits, escape="latex", na_rep="--")
        table = styler.format_index(escape="latex", axis="columns").to_latex(
            hrules=True, column_format=columns, caption=caption, label=f"tab:{name}", position_float="centering"
        )
        self._write_text(f"paper/tables/{name}.tex", table)

    def _write_text(self, path: str, text: str) -> None:
        write_atomically(self.folder / path, text.encode())
