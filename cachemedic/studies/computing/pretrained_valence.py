"""Valence behind damaged caches of a pretrained model (notebook 26), by a probe trained here, and its answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch

from cachemedic.core.progress import tqdm
from cachemedic.core.seeds import generator
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.types import NONE
from cachemedic.data.task_data import TaskData
from cachemedic.data.tasks import perplexity_task
from cachemedic.data.text_source import Review, TextSource
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.defenses.registry import DEFENSES
from cachemedic.evaluation import statistics as stats
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.evaluation.experiments import TYPES, calibration_of, kept_frame, per_seed, standard_tasks
from cachemedic.models.load import Base
from cachemedic.studies import pretrained, valence_report
from cachemedic.studies.computing.valence_probe import probe
from cachemedic.studies.family_evaluation import bytes_per_token
from cachemedic.studies.measured_valence import measure_valence
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import by_group, in_order, means_over_seeds
from cachemedic.training.valence.head import Valence

COPY = "shadow_2bit"
SEVERITY = 0.5
PROBED = (2000, 400, 872)  # reviews to train, validate and test the probe on
TEXTS, REVIEWS = 4, 12  # a seed
CACHED, SCORED, HORIZON = 64, 16, 10  # tokens
CALIBRATION = 16  # windows whose ranges clip
WORDS = 90  # of a text of one mood: they make more tokens than are read
MEASURES = ("kl", "gap", "ratio", "shift")


def moods(reviews: Sequence[Review], count: int) -> list[str]:
    """`count` texts of one mood each, negative and positive in turn: reviews of one label, joined, none of them twice.

    Raises `ValueError` if there are too few reviews.
    """
    order = torch.randperm(len(reviews), generator=generator("moods")).tolist()
    by_label = [iter([reviews[i][0] for i in order if reviews[i][1] == label]) for label in (0, 1)]
    texts = []
    for number in range(count):
        joined = ["Review:"]
        while len(" ".join(joined).split()) < WORDS:
            review = next(by_label[number % 2], None)
            if review is None:
                raise ValueError(f"{len(reviews)} reviews make {number} texts of {WORDS} words; {count} are needed")
            joined.append(review)
        texts.append(" ".join(joined))
    return texts


def mood_task(base: Base, reviews: Sequence[Review], seeds: Sequence[int], n: int) -> TaskData:
    """`n` texts of `moods` a seed, of which `CACHED` tokens are cached and `SCORED` scored."""
    texts = moods(reviews, n * len(seeds))
    return replace(perplexity_task(base.tokenizer, texts, seeds, n, CACHED, SCORED), name="mood")


def readers_of(run: Run, base: Base, source: TextSource) -> dict[str, Defense]:
    """What is compared, by name; the heuristic is the one that notebook 17 found best on its validation split."""
    calibration = calibration_of(base, 4 if run.smoke else CALIBRATION, source)
    results = run.read_csv("pretrained_results")
    best = results.loc[results["best_heuristic"], "reader"].iloc[0]
    baselines = {name: DEFENSES[name](calibration) for name in (best, COPY)}
    return {"none": NoDefense(), **baselines, **pretrained.token_readers(base, source)}


def faults(run: Run, base: Base) -> Iterator[CorruptionSpec]:
    """A sound cache, and every type, which all reach `SEVERITY`."""
    assert base.severity_map is not None  # `results` gives it
    yield CorruptionSpec(NONE)
    for kind in TYPES[:2] if run.smoke else TYPES:
        yield CorruptionSpec(kind, SEVERITY, base=base.name, severity_map=base.severity_map)


def grid(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense], valence: Valence) -> pd.DataFrame:
    """`valence_report.per_seed` of all readers on texts of one mood."""
    task = mood_task(base, source.reviews_of("test") or (), run.parameters["seeds"], 2 if run.smoke else TEXTS)
    clean = clean_pass(base.model, task)

    def measured(spec: CorruptionSpec) -> pd.DataFrame:
        return valence_report.per_seed(measure_valence(base.model, task, clean, spec, readers, valence, HORIZON))

    parts = [
        kept_frame(run.partial / f"mood-{spec.type}.csv", partial(measured, spec))
        for spec in tqdm(list(faults(run, base)), desc=f"valence, {base.name}")
    ]
    return pd.concat(parts, ignore_index=True)


def answers(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """How often the prompted model names the mood of a review, a row for each type, reader and seed."""
    counts = {"sentiment": 4 if run.smoke else REVIEWS}
    task = standard_tasks(base, "test", run.parameters["seeds"], counts, source)["sentiment"]
    clean = clean_pass(base.model, task)

    def scores(spec: CorruptionSpec) -> pd.DataFrame:
        return per_seed(evaluate(base.model, task, clean, spec, readers), task.name, spec)

    parts = [
        kept_frame(run.partial / f"sentiment-{spec.type}.csv", partial(scores, spec))
        for spec in tqdm(list(faults(run, base)), desc=f"sentiment, {base.name}")
    ]
    return pd.concat(parts, ignore_index=True)


def summary(measured: pd.DataFrame) -> pd.DataFrame:
    """A row per reader, means over damaged types, with 95% t intervals over seeds.

    kl, gap, ratio and shift as in `valence_report.summary`, and what a reader leaves less than none and than E,
    paired within seeds (`gap_less_none`, `gap_less_e`, ...): below zero it is better.
    """
    damaged = measured[measured["type"] != NONE]
    means = damaged.groupby(["reader", "seed"], sort=False)[list(valence_report.MEASURES)].mean()
    means = means.assign(ratio=means["projected"] / means["projected_teacher"], shift=means["sentiment_shift"])
    rows = []
    for reader in means.index.unique("reader"):
        own, row = means.loc[reader], {"reader": reader}
        for name in MEASURES:
            row |= stats.t_interval(own[name]).columns(name)
            for against in ("none", "E"):
                less = stats.paired_interval(own[name], means.loc[against][name])
                row |= less.columns(f"{name}_less_{against.lower()}")
        rows.append(row | {"n_seeds": len(own)})
    return pd.DataFrame(rows)


def results(run: Run, source: TextSource) -> dict[str, pd.DataFrame]:
    """`source`: text and reviews; what the parameters record of them are names and a digest."""
    base = pretrained.base_of(run)
    readers = readers_of(run, base, source)
    head, scored = probe(base, source, (120, 40, 60) if run.smoke else PROBED, run.partial)
    measured = grid(run, base, source, readers, head)
    asked = answers(run, base, source, readers)
    accuracies = by_group(asked, ["type"], partial(means_over_seeds, keys=["reader"], columns=["accuracy"]))
    overall = summary(measured).merge(bytes_per_token(base, readers), on="reader")
    return {
        "pretrained_valence_probe": scored,
        "pretrained_valence_grid": measured,
        "pretrained_valence": in_order(overall, "reader", readers),
        "pretrained_valence_by_type": in_order(
            by_group(measured, ["type"], partial(means_over_seeds, keys=["reader"], columns=["gap"])),
            "reader",
            readers,
        ),
        "pretrained_valence_sentiment": in_order(accuracies, "reader", readers),
    }
