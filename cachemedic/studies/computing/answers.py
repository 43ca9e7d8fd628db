"""Answers before and after repair (notebook 22): what a chat model says from a damaged and from a repaired cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.chats import chat_task
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.defenses.registry import DEFENSES
from cachemedic.defenses.shadows import GroupQuantisedShadow
from cachemedic.evaluation.answers import CLEAN, measure_answers
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import TYPES, calibration_of, kept_frame
from cachemedic.models.load import Base, load_base
from cachemedic.models.shape import ModelShape
from cachemedic.studies import pretrained
from cachemedic.studies.family_evaluation import bytes_per_token
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import by_group, in_order, means_over_seeds

BASELINES = ("range_restriction", "shadow_2bit")  # to recompute is to have the sound cache
COPY_GROUPS = (64, 128)  # longer than the usual group of a copy: fewer bytes
CONVERSATIONS = 8  # a seed
SEVERITIES = (0.5, 1.0)
CALIBRATION = 16  # windows whose ranges clip
KIND = ["type", "severity"]


def readers_of(base: Base, source: TextSource, smoke: bool) -> dict[str, Defense]:
    """What is compared, by name."""
    calibration = calibration_of(base, 4 if smoke else CALIBRATION, source)
    baselines: dict[str, Defense] = {name: DEFENSES[name](calibration) for name in BASELINES}
    for group in COPY_GROUPS:
        baselines[f"shadow_2bit, group {group}"] = GroupQuantisedShadow(calibration.shape, 2, group)
    return {"none": NoDefense(), **baselines, **pretrained.token_readers(base, source)}


def conversations(run: Run, base: Base, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """A row for each type, severity, reader and conversation."""
    assert base.severity_map is not None  # `results` gives it
    task = chat_task(base.tokenizer, run.parameters["seeds"], 4 if run.smoke else CONVERSATIONS)
    clean, shape = clean_pass(base.model, task), ModelShape.of(base.config)
    frames = []
    for kind in TYPES[:2] if run.smoke else TYPES:
        reach = base.severity_map.reach(kind, base.name, (shape.num_layers, shape.num_kv_heads, 0))
        for severity in sorted({min(severity, reach) for severity in SEVERITIES}):
            spec = CorruptionSpec(kind, severity, base=base.name, severity_map=base.severity_map)

            def answers(spec: CorruptionSpec = spec) -> pd.DataFrame:
                return measure_answers(base.model, base.tokenizer, task, clean, spec, readers)

            rows = kept_frame(run.partial / f"{kind}-{severity}.csv", answers)
            frames.append(rows.assign(type=kind, severity=severity))
    return pd.concat(frames, ignore_index=True)


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of what `conversations` found, over all types and severities."""
    return means_over_seeds(rows, ["reader"], ["named", "same"])


def results(run: Run, source: TextSource) -> dict[str, pd.DataFrame]:
    """`source`: the text of calibration; what the parameters record of it are names and a digest."""
    base = load_base(run.parameters["base"], device=run.parameters["device"])
    base = replace(base, severity_map=SeverityMap(run.read_csv("pretrained_severities")))
    readers = readers_of(base, source, run.smoke)
    rows = conversations(run, base, readers)
    names = [CLEAN, *readers]
    overall = shares(rows).merge(bytes_per_token(base, readers), on="reader", how="left")
    return {
        "answers": rows,
        "answers_results": in_order(overall, "reader", names),
        "answers_by_type": in_order(by_group(rows, KIND, shares), "reader", names),
        "answers_by_question": in_order(by_group(rows, ["question"], shares), "reader", names),
    }
