"""The frontier (notebook 18): what each repair leaves, and how long it takes, on a pretrained model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel

from cachemedic.core.progress import tqdm
from cachemedic.corruption.spec import CorruptionSpec
from cachemedic.data.task_data import TaskData
from cachemedic.data.text_source import TextSource
from cachemedic.defenses.defense import Around, CachedTokens, Defense, cache_bytes_per_token
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.defenses.registry import DEFENSES
from cachemedic.evaluation.decoding import CleanBank, clean_pass
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.evaluation.experiments import calibration_of, kept_frame
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.models.load import Base, load_base
from cachemedic.models.shape import ModelShape
from cachemedic.studies import pretrained
from cachemedic.studies.family_evaluation import bytes_per_token
from cachemedic.studies.run import Run
from cachemedic.studies.summaries import in_order, means_over_seeds
from cachemedic.token.cache import SketchCache
from cachemedic.token.costs import costs_of
from cachemedic.token.joint import SINKS
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.policy import Policy

PREFIX = 1024  # cached tokens
DAMAGED = (0.01, 0.1, 1.0)  # shares of them
NOISE = 0.5  # of its size, on each vector
EXAMPLES = 2  # texts a seed
BUDGET = 0.15  # of the automatic choice, of a prefill
BASELINES = ("checksum_erase", "shadow_2bit", "shadow_4bit")


@dataclass(frozen=True, eq=False)
class Timed(Around):
    """Another defense, of which the seconds of each read are noted."""

    seconds: list[float] = field(default_factory=list)

    def read(self, damaged: CachedTokens, kept: Any) -> CachedTokens:
        start = time.perf_counter()
        found = self.inner.read(damaged, kept)
        self.seconds.append(time.perf_counter() - start)
        return found


@dataclass(frozen=True, eq=False)
class InCache(Defense):
    """A `SketchCache` that is checked and repaired by one method, as an engineer does it: only changed tokens are
    worked on. Without an operator it keeps ids and hashes.
    """

    model: PreTrainedModel
    operator: JointOperator | None
    method: str
    budget: float | None = None

    @property
    def bytes_per_token(self) -> float:
        return SketchCache(self.model, self.operator).bytes_per_token

    @property
    def cache_bytes(self) -> int:
        whole = cache_bytes_per_token(ModelShape.of(self.model.config))
        return 0 if self.operator is None else SINKS * whole

    @property
    def fixed_bytes(self) -> int:
        return 0 if self.operator is None else self.operator.fixed_bytes

    @torch.inference_mode()
    def write(self, clean: CachedTokens) -> SketchCache:
        cache = SketchCache(self.model, self.operator)
        cache.adopt(unstack_cache(clean.k.clone(), clean.v.clone()), clean.ids, clean.positions)
        if self.budget is not None:
            costs_of(cache.model, cache.coder, Policy(cache, self.method, self.budget).ways)  # measured once, before
        return cache

    @torch.inference_mode()
    def read(self, damaged: CachedTokens, kept: SketchCache) -> CachedTokens:
        kept.layers = unstack_cache(damaged.k.clone(), damaged.v.clone()).layers
        kept.repair(self.method, self.budget)
        k, v = stack_cache(kept)
        erased = kept.unread()
        return replace(damaged, k=k, v=v, readable=None if erased is None else damaged.valid & ~erased)


def faults(length: int, share: float) -> dict[str, CorruptionSpec]:
    """By name: what is left of a token under noise helps to repair it, what another text has written does not."""
    return {
        "noise": CorruptionSpec("gaussian", parameter=NOISE, share=share),
        "another text": CorruptionSpec("contiguous_overwrite", parameter=max(1, round(share * length))),
    }


def readers_of(base: Base, source: TextSource, smoke: bool) -> dict[str, Defense]:
    """What is compared, by name."""
    calibration = calibration_of(base, 2 if smoke else 8, source)
    baselines = {name: DEFENSES[name](calibration) for name in BASELINES}
    found = pretrained.operators(base, source)
    repairs: dict[str, Defense] = {"D, hashes": InCache(base.model, found["D"], "estimate")}
    repairs |= {f"E, {method}": InCache(base.model, found["E"], method) for method in ("restore", "estimate")}
    repairs["recompute"] = InCache(base.model, None, "recompute")
    repairs[f"auto, {BUDGET:.0%} of a prefill"] = InCache(base.model, found["E"], "auto", BUDGET)
    return {"none": NoDefense(), **baselines, **repairs}


def grid_of(run: Run, base: Base, source: TextSource, readers: Mapping[str, Defense]) -> pd.DataFrame:
    """A row for each fault, share of damaged tokens, seed, reader and text: NLL, KL, and `time`: of the reads of the
    texts of a seed, over that of a prefill of the same texts just before.
    """
    prefix = min(PREFIX, base.context - 2 * pretrained.SCORED)
    documents, size = source.documents_of("test"), 2 if run.smoke else EXAMPLES
    task = pretrained.language_task(base, documents, "test", run.parameters["seeds"], size, prefix)
    clean = clean_pass(base.model, task)
    conditions = [(share, *fault) for share in DAMAGED for fault in faults(prefix, share).items()]
    frames = []
    for share, name, spec in tqdm(conditions, desc=f"repair of {prefix} tokens"):

        def of_condition(share: float = share, name: str = name, spec: CorruptionSpec = spec) -> pd.DataFrame:
            of_seeds = [_of_seed(base, task, clean, seed, spec, readers) for seed in task.seeds.unique()]
            return pd.concat(of_seeds).assign(fault=name, damaged=share)

        frames.append(kept_frame(run.partial / f"{name}-{share}.csv", of_condition))
    columns = ["fault", "damaged", "reader", "seed", "example", "nll_clean", "nll", "kl", "time"]
    return pd.concat(frames, ignore_index=True)[columns]


def _of_seed(
    base: Base,
    task: TaskData,
    clean: CleanBank,
    seed: torch.Tensor,
    spec: CorruptionSpec,
    readers: Mapping[str, Defense],
) -> pd.DataFrame:
    rows = (task.seeds == seed).nonzero().squeeze(1)
    own, bank = task.select(rows), CleanBank(clean.k[rows], clean.v[rows], clean.logits[rows])
    prefill = sum(_prefill_seconds(base, ids) for ids in own.prefix_ids)
    timed = {name: Timed(defense) for name, defense in readers.items()}
    scores = evaluate(base.model, own, bank, spec, timed)
    return scores.assign(time=scores["reader"].map({name: sum(d.seconds) / prefill for name, d in timed.items()}))


@torch.inference_mode()
def _prefill_seconds(base: Base, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    base.model(ids[None].to(base.model.device), logits_to_keep=1)
    return time.perf_counter() - start


def results(run: Run, source: TextSource) -> dict[str, pd.DataFrame]:
    """`source`: the text; what the parameters record of it are names and a digest."""
    base = load_base(run.parameters["base"], device=run.parameters["device"])
    readers = readers_of(base, source, run.smoke)
    grid = grid_of(run, base, source, readers)
    means = means_over_seeds(grid, ["fault", "damaged", "reader"], ["kl", "time"])
    means = means.merge(bytes_per_token(base, readers), on="reader")
    means = in_order(means, "reader", readers).sort_values("damaged", kind="stable")
    return {"frontier_grid": grid, "frontier_results": in_order(means, "fault", faults(PREFIX, 1.0))}
