"""What the text of calibration decides (notebook 25): E calibrated on one kind of text or on all, asked about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.corruption.types import NONE
from cachemedic.data.tasks import perplexity_task
from cachemedic.data.text import LABELS, documentation, sentiment_prompt, sentiment_review, source_code
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.heuristics import NoDefense, Reset
from cachemedic.evaluation import statistics as stats
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.evaluation.experiments import SPLIT_OFFSET, kept_frame, run_grid, standard_tasks
from cachemedic.models.load import Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import means_over_seeds
from cachemedic.token.calibration_text import default_texts
from cachemedic.token.joint_calibrate import calibrate
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.token_repair import TokenRepair

ALL = "all kinds"  # what the operators that ship are calibrated on
ALONE = ("prose", "reviews")  # kinds of `default_texts` that stand alone
PREFIX, SCORED = 128, 16  # tokens
WINDOWS, REVIEWS = 8, 24  # of each kind of text, and reviews to judge, a seed
JOINED, DOCUMENTS = 40, 40  # reviews that make a document, and how many of these there are
SEVERITIES = (0.5, 1.0)
NOISE = 0.5  # of the size of each vector
CODE, ESTIMATE = "E, code alone", "E"


def operators(base: Base) -> dict[str, JointOperator]:
    """E by what it was calibrated on."""
    texts, found = default_texts(base), dict[str, JointOperator]()
    for kind in ALONE:
        operator = RepairOperator.create("E", base.config, layers="all").to(base.model.device)
        found[kind] = calibrate(operator, base, {kind: texts[kind]})
    shipped = RepairOperator.from_pretrained(f"E/{base.name}").to(base.model.device)
    assert isinstance(shipped, JointOperator)
    return found | {ALL: shipped}


def readers_of(base: Base, found: Mapping[str, JointOperator]) -> dict[str, Defense]:
    """No defence, and of each calibration E and its code alone; named `reader | calibration`."""
    readers: dict[str, Defense] = {"none": NoDefense()}
    for kind, operator in found.items():
        readers[f"{CODE} | {kind}"] = TokenRepair(base.model, operator, "restore")
        readers[f"{ESTIMATE} | {kind}"] = TokenRepair(base.model, operator)
    return readers


def named_apart(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with the names of `readers_of` in two columns: reader, and calibrated, empty for what is not."""
    parts = rows["reader"].str.partition(" | ")
    return rows.assign(reader=parts[0], calibrated=parts[2])


def kinds_of_text(base: Base) -> dict[str, Sequence[str]]:
    """Unseen text of the three kinds that the operators that ship know."""
    rng = np.random.default_rng([0, 25])
    drawn = [sentiment_review(rng) for _ in range(JOINED * DOCUMENTS)]
    reviews = [f"{sentiment_prompt(text)} {LABELS[label]}" for text, label in drawn]
    joined = [base.tokenizer.eos_token.join(reviews[at : at + JOINED]) for at in range(0, len(reviews), JOINED)]
    return {"prose": documentation("test"), "code": source_code("test"), "reviews": joined}


def faults() -> dict[str, CorruptionSpec]:
    """Every token is hit: another text in its place, of which nothing helps, or noise."""
    return {
        "lost": CorruptionSpec("contiguous_overwrite", parameter=PREFIX),
        "noise": CorruptionSpec("gaussian", parameter=NOISE),
    }


def kl_by_kind(run: Run, base: Base, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """A row for each kind of text, fault, reader, seed and text: kl; "erased" is a cache of which nothing is read."""
    frames, compared = [], {**readers, "erased": Reset()}
    seeds, count = run.parameters["seeds"], 2 if run.smoke else WINDOWS
    for kind, documents in kinds_of_text(base).items():
        for fault, spec in faults().items():

            def scores(documents: Sequence[str] = documents, spec: CorruptionSpec = spec) -> pd.DataFrame:
                drawn = [seed + SPLIT_OFFSET["test"] for seed in seeds]
                task = perplexity_task(base.tokenizer, documents, drawn, count, PREFIX, SCORED)
                rows = evaluate(base.model, task, clean_pass(base.model, task), spec, compared)
                return rows[["reader", "seed", "example", "nll_clean", "nll", "kl"]]

            rows = kept_frame(run.partial / f"{base.name}-{kind}-{fault}.csv", scores)
            frames.append(rows.assign(kind=kind, fault=fault))
    return named_apart(pd.concat(frames, ignore_index=True))


def accuracy_grid(run: Run, base: Base, readers: Mapping[str, Defense], folder: Path) -> pd.DataFrame:
    """Sentiment by type, severity, reader and seed, the clean cache among them."""
    examples = {"sentiment": 4 if run.smoke else REVIEWS}
    tasks = standard_tasks(base, "test", run.parameters["seeds"], examples)
    return named_apart(run_grid(base, tasks, readers, folder, severities=SEVERITIES))


def accuracies(grid: pd.DataFrame) -> pd.DataFrame:
    """By reader and calibration, over seeds: accuracy over all faults, its paired `gain` over no defence, and `clean`,
    that on sound caches.
    """
    keys = ["reader", "calibrated"]
    hit, clean = grid[grid["type"] != NONE], grid[grid["type"] == NONE]
    of_seeds = hit.groupby([*keys, "seed"], sort=False)["accuracy"].mean()
    undefended = of_seeds.loc["none", ""].sort_index()
    rows = []
    for key, own in of_seeds.groupby(level=keys, sort=False):
        own = own.droplevel(keys).sort_index()
        sound = clean[(clean["reader"] == key[0]) & (clean["calibrated"] == key[1])]
        row = dict(zip(keys, key, strict=True))
        row |= stats.t_interval(own).columns("accuracy")
        row |= stats.paired_interval(own, undefended).columns("gain")
        row |= stats.t_interval(sound.groupby("seed")["accuracy"].mean()).columns("clean")
        rows.append(row | {"n_seeds": len(own), "n_examples": int(sound["n_examples"].sum())})
    return pd.DataFrame(rows)


def results(run: Run) -> dict[str, pd.DataFrame]:
    texts, grids = [], []
    for name in dict.fromkeys((run.parameters["base"], run.parameters["second"])):
        base = load_base(name, device=run.parameters["device"])
        readers = readers_of(base, operators(base))
        texts.append(kl_by_kind(run, base, readers).assign(base=name))
        grids.append(accuracy_grid(run, base, readers, run.partial / "sentiment").assign(base=name))
    rows, grid = (pd.concat(frames, ignore_index=True) for frames in (texts, grids))
    found = [accuracies(part).assign(base=name) for name, part in grid.groupby("base", sort=False)]
    return {
        "calibration_text_grid": rows,
        "calibration_text_kl": means_over_seeds(rows, ["base", "kind", "fault", "reader", "calibrated"], ["kl"]),
        "calibration_text_sentiment": grid,
        "calibration_text_accuracy": pd.concat(found, ignore_index=True),
    }
