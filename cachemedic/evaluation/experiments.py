"""The grid of an experiment: every defense on every task, type and severity."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from cachemedic.core.files import read_hashed, write_hashed
from cachemedic.core.progress import tqdm
from cachemedic.core.severity_map import GRID
from cachemedic.corruption.apply import MIXTURE_WEIGHTS
from cachemedic.corruption.severity import shipped_map
from cachemedic.corruption.spec import Axis, CorruptionSpec
from cachemedic.corruption.types import NONE
from cachemedic.data.task_data import TaskData
from cachemedic.data.tasks import needle_task, perplexity_task, sentiment_task
from cachemedic.data.text_source import EMBEDDED_TEXT, TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.registry import Calibration
from cachemedic.evaluation.decoding import CleanBank, clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape

TYPES = tuple(MIXTURE_WEIGHTS)
EXAMPLES = {"perplexity": 20, "sentiment": 24, "needle": 10}  # per seed, in the paper profile
SPLIT_OFFSET = {"test": 0, "validation": 1000, "calibration": 2000}
ID_COLUMNS = ["task", "type", "severity", "reader", "seed"]


def standard_tasks(
    base: Base,
    split: str,
    seeds: Sequence[int],
    examples: Mapping[str, int] = EXAMPLES,
    source: TextSource = EMBEDDED_TEXT,
) -> dict[str, TaskData]:
    """The three tasks on one documentation split, `examples` of each per seed; a task of no examples is left out."""
    documents = source.documents_of(split)
    # the generated parts of validation and calibration examples come from generators that the test split never uses
    drawn = [seed + SPLIT_OFFSET[split] for seed in seeds]
    tasks = {}
    if n := examples.get("perplexity"):
        tasks["perplexity"] = perplexity_task(base.tokenizer, documents, drawn, n)
    if n := examples.get("sentiment"):
        tasks["sentiment"] = sentiment_task(base.tokenizer, drawn, n, split, source.reviews_of(split))
    if n := examples.get("needle"):
        tasks["needle"] = needle_task(base.tokenizer, documents, drawn, n)
    return tasks


def calibration_of(base: Base, windows: int = 64, source: TextSource = EMBEDDED_TEXT) -> Calibration:
    """What defenses of a base are made from: its clean caches on `windows` texts of the calibration split."""
    task = standard_tasks(base, "calibration", [0], {"perplexity": windows}, source)["perplexity"]
    return Calibration(base.model, clean_pass(base.model, task).tokens(task))


def run_grid(
    base: Base,
    tasks: Mapping[str, TaskData],
    defenses: Mapping[str, Defense],
    folder: Path | None,
    layers: Axis = "all",
    types: Sequence[str] = TYPES,
    severities: Sequence[float] = GRID,
) -> pd.DataFrame:
    """Every defense on every task, type and severity (0 and `severities`, as far as a type reaches).

    `layers` says which layers the faults hit. One row per `ID_COLUMNS` with columns parameter, share, nll, nll_clean,
    kl, accuracy (NaN where not graded) and n_examples. Finished conditions are kept under `folder`, from where an
    interrupted grid goes on (None: not kept).
    """
    shape, calibrated = ModelShape.of(base.config), base.severity_map or shipped_map()
    conditions = [(name, CorruptionSpec(NONE)) for name in tasks]
    for name in tasks:
        for corruption in types:
            limit = calibrated.reach(corruption, base.name, (shape.num_layers, shape.num_kv_heads, 0))
            for severity in sorted({min(s, limit) for s in severities}):
                spec = CorruptionSpec(corruption, severity, layers=layers, base=base.name, severity_map=calibrated)
                conditions.append((name, spec))
    banks: dict[str, CleanBank] = {}
    frames = []
    for name, spec in tqdm(conditions, desc=f"grid on {base.name}"):

        def scores(name: str = name, spec: CorruptionSpec = spec) -> pd.DataFrame:
            nonlocal banks
            if name not in banks:
                banks = {name: clean_pass(base.model, tasks[name])}  # one at a time: a bank can be large
            return per_seed(evaluate(base.model, tasks[name], banks[name], spec, defenses), name, spec)

        label = f"{Path(base.name).name}-{name}-{spec.type}-{spec.severity}.csv"
        frames.append(kept_frame(None if folder is None else folder / label, scores))
    return pd.concat(frames, ignore_index=True)


def kept_frame(path: Path | None, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The frame in a file of an interrupted run, else one that is computed and kept there (None: not kept)."""
    if path is not None and path.exists():
        return pd.read_csv(io.BytesIO(read_hashed(path)))
    frame = compute()
    if path is not None:
        write_hashed(path, frame.to_csv(index=False).encode())
    return frame


def per_seed(scores: pd.DataFrame, task: str, spec: CorruptionSpec) -> pd.DataFrame:
    """Means over the examples of each seed, and the condition."""
    scores = scores.astype(dict.fromkeys(("nll", "nll_clean", "kl", "correct"), float))  # sums in double precision
    grouped = scores.groupby(["reader", "seed"], sort=False)
    means = grouped.agg(
        parameter=("parameter", "mean"), share=("share", "mean"), nll=("nll", "mean"), nll_clean=("nll_clean", "mean"),
        kl=("kl", "mean"), accuracy=("correct", "mean"), n_examples=("nll", "size"),
    )  # fmt: skip
    means = means.reset_index()
    means.insert(0, "task", task)
    means.insert(1, "type", spec.type)
    means.insert(2, "severity", spec.severity or 0.0)
    return means
