"""A pretrained model at the centre: the base, operators, readers and texts of its notebooks.

A condition of the main result is a type and a severity. Each example meets every second type, at one of the severities
in turn: a full grid would take eight times as long for as many texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cachemedic.core.cache_folder import cache_folder
from cachemedic.core.progress import tqdm
from cachemedic.core.severity_map import GRID, SeverityMap
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.types import NONE
from cachemedic.data.task_data import TaskData
from cachemedic.data.tasks import perplexity_task
from cachemedic.data.text import documentation, source_code
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.evaluation.decoding import CleanBank, clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.evaluation.experiments import SPLIT_OFFSET, TYPES, kept_frame, per_seed
from cachemedic.models.load import Base, load_base
from cachemedic.models.shape import ModelShape
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.run import Run
from cachemedic.token.calibration_text import dialogues, source_texts
from cachemedic.token.coder import joint_operator
from cachemedic.token.joint_calibrate import calibrate
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.token_repair import TokenRepair

PREFIX, SCORED = 128, 16  # tokens
CALIBRATES = Path(__file__).parents[1] / "token"  # the code that operators come from


def base_of(run: Run) -> Base:
    """The base that the run names, with the severities that notebook 17 calibrated."""
    calibrated = SeverityMap(run.read_csv("pretrained_severities"))
    return load_base(run.parameters["base"], device=run.parameters["device"], severity_map=calibrated)


def operators(base: Base, source: TextSource) -> dict[str, JointOperator]:
    """D and E of a base, calibrated on text of all kinds; this machine keeps them, as they are too large to ship.

    Other text, and other code that calibrates, make operators of their own.
    """
    code = sha256(b"".join(path.read_bytes() for path in sorted(CALIBRATES.glob("*.py")))).hexdigest()
    name = f"{Path(base.name).name}-{source.digest[:12] or 'default'}-{code[:12]}"
    folder = cache_folder() / "operators" / name
    found: dict[str, JointOperator] = {}
    joint = None
    for family in ("D", "E"):
        if not (folder / family / "config.json").is_file():
            operator = RepairOperator.create(family, base.config, layers="all").to(base.model.device)
            calibrate(operator, base, source_texts(base, source), joint).save_pretrained(folder / family)
        found[family] = joint_operator(RepairOperator.from_pretrained(folder / family).to(base.model.device))
        joint = found[family].calibrated
    return found


def token_readers(base: Base, source: TextSource) -> dict[str, Defense]:
    """D, E and the code of E alone."""
    found = operators(base, source)
    return {
        "D": TokenRepair(base.model, found["D"]),
        "E, code alone": TokenRepair(base.model, found["E"], "restore"),
        "E": TokenRepair(base.model, found["E"]),
    }


def language_task(
    base: Base, documents: Sequence[str], split: str, seeds: Sequence[int], n: int, prefix: int = PREFIX
) -> TaskData:
    """Language modelling of documents, `n` windows a seed."""
    drawn = [seed + SPLIT_OFFSET[split] for seed in seeds]
    return perplexity_task(base.tokenizer, documents, drawn, n, prefix, SCORED)


def kinds_of_text(base: Base, source: TextSource) -> dict[str, Sequence[str]]:
    """Text that nothing was fitted to, by kind. Calibration has seen others of each kind, but for C++: the headers that
    come with PyTorch.
    """
    prose = documentation("test")
    found: dict[str, Sequence[str]] = {"articles": source.documents_of("test")} if source.documents else {}
    found |= {"prose": prose, "Python": source_code("test")}
    if base.tokenizer.chat_template:
        found["dialogue"] = dialogues(base, prose)
    headers = sorted((Path(torch.__file__).parent / "include" / "c10").rglob("*.h"))
    return found | {"C++, never seen": tuple(path.read_text(encoding="utf-8") for path in headers)}


def balanced(task: TaskData, severities: Sequence[float] = GRID) -> Iterator[tuple[str, float, Tensor]]:
    """Type, severity and rows of each condition: equally many, if 2 len(severities) divides those of a seed."""
    seeds = pd.Series(task.seeds.numpy())
    example = seeds.groupby(seeds).cumcount().to_numpy()
    for place, kind in enumerate(TYPES):
        for at, severity in enumerate(severities):
            meets = (example % 2 == place % 2) & ((example // 2 + place // 2) % len(severities) == at)
            yield kind, severity, torch.from_numpy(np.flatnonzero(meets))


def balanced_grid(
    base: Base, task: TaskData, defenses: Mapping[str, Defense], folder: Path, severities: Sequence[float] = GRID
) -> pd.DataFrame:
    """The rows of `experiments.run_grid` for the conditions of `balanced`, and for the clean caches of all examples.

    A type that does not reach a severity is hit as hard as it goes. `folder`: where finished conditions are kept.
    """
    assert base.severity_map is not None  # whoever calls has calibrated it
    shape = ModelShape.of(base.config)
    bank = clean_pass(base.model, task)
    conditions: list[tuple[CorruptionSpec, Tensor]] = [(CorruptionSpec(NONE), torch.arange(len(task)))]
    for kind, severity, rows in balanced(task, severities):
        reach = base.severity_map.reach(kind, base.name, (shape.num_layers, shape.num_kv_heads, 0))
        at = min(severity, reach)
        conditions.append((CorruptionSpec(kind, at, base=base.name, severity_map=base.severity_map), rows))
    frames = []
    for number, (spec, rows) in enumerate(tqdm(conditions, desc=f"{task.name}, {base.name}")):

        def scores(spec: CorruptionSpec = spec, rows: Tensor = rows) -> pd.DataFrame:
            part = CleanBank(bank.k[rows], bank.v[rows], bank.logits[rows])
            return per_seed(evaluate(base.model, task.select(rows), part, spec, defenses), task.name, spec)

        frames.append(kept_frame(folder / f"{task.name}-{number}-{spec.type}-{spec.severity}.csv", scores))
    return pd.concat(frames, ignore_index=True)
