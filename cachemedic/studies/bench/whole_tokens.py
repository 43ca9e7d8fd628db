"""What a SketchCache with an operator costs, as shares of a prefill: write, check, repair; and a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from cachemedic.core.threads import one_thread
from cachemedic.data.text import documentation
from cachemedic.models.load import Base, load_base
from cachemedic.studies.bench.timing import interleave, row, timed
from cachemedic.token.cache import SketchCache
from cachemedic.token.calibration_text import windows
from cachemedic.token.joint_operator import JointOperator

DAMAGED = (0.01, 0.1, 1.0)  # shares of the tokens
MEASURED_WAYS = ("restore", "estimate", "recompute")
ROUNDS = 7
STEPS = 16  # decoding steps a round: one of them in a page of 16 writes the codes of the page
NOISE = 0.5  # of the damage, over the size of the numbers


@dataclass(frozen=True)
class Setting:
    """What is measured: a base in a number format, an operator of a family, caches of some lengths, on how many cores.

    cores: "one", or "all" that torch takes by itself.
    """

    base: str
    family: str
    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    cores: str = "all"


SETTINGS = (
    *(Setting(base, family, (448,)) for base in ("embedded-gpt2", "embedded-llama") for family in ("D", "E")),
    Setting("smollm2-135m", "E", (1024, 4096)),
    Setting("smollm2-135m", "E", (1024,), torch.bfloat16, "one"),
)


def measured(setting: Setting, operator: JointOperator) -> pd.DataFrame:
    """What `repair_cost` finds in a setting, with the columns dtype and cores."""
    base = load_base(setting.base, dtype=setting.dtype)
    with one_thread() if setting.cores == "one" else nullcontext():
        found = repair_cost(base, operator, setting.lengths)
    return found.assign(dtype=str(setting.dtype).removeprefix("torch."), cores=setting.cores)


@torch.inference_mode()
def repair_cost(
    base: Base, operator: JointOperator, lengths: Sequence[int], rounds: int = ROUNDS, seed: int = 0
) -> pd.DataFrame:
    """One row for each operation, cache length (those that the context holds) and share of damaged tokens.

    The cached tokens are those of documentation (its test split): how long an estimate takes depends on what it finds.
    "write" is what a prefill takes longer than a plain one; "check" looks at a cache without damage; the others check
    and repair. Columns base, operator (its family), operation, positions, damaged, milliseconds, reference, its
    milliseconds, ratio with a 95% interval (medians over rounds), rounds, bytes_per_token (all that is kept beside a
    token), code_bytes, share (of the code in the bytes of a token), fixed_bytes (of the operator).
    """
    model, found = base.model, []
    for length in (length for length in lengths if length + STEPS * (rounds + 1) <= base.context):
        generator = torch.Generator().manual_seed(seed)
        ids = windows(base, documentation("test"), 1, length, seed).to(model.device)
        found += _at_length(model, operator, ids, rounds, generator)
    bytes_of = SketchCache(model, operator)
    per_token = 2 * bytes_of.shape.num_layers * bytes_of.shape.num_kv_heads * bytes_of.shape.head_dim
    kept = {
        "bytes_per_token": bytes_of.bytes_per_token,
        "code_bytes": operator.bytes_per_token,
        "share": operator.bytes_per_token / (per_token * model.dtype.itemsize),
        "fixed_bytes": operator.fixed_bytes,
    }
    columns = {"base": base.name, "operator": operator.config.family}
    return pd.DataFrame([columns | entry | kept for entry in found])


def _at_length(
    model: PreTrainedModel, operator: JointOperator, ids: Tensor, rounds: int, generator: torch.Generator
) -> list[dict[str, object]]:
    length, depth = ids.shape[1], model.config.get_text_config(decoder=True).num_hidden_layers

    def prefill(cache: Cache) -> Cache:
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    plain, kept = prefill(DynamicCache()), SketchCache(model, operator)
    prefill(kept)
    contenders: dict[str, Callable[[], float]] = {
        "prefill": timed(lambda: prefill(DynamicCache())),
        "prefill that writes": timed(lambda: prefill(SketchCache(model, operator))),
        "check": _after_damage(kept, plain, 0.0, kept.check, generator),
    }
    named = {(way, share): f"{way}, {share:.0%}" for way in MEASURED_WAYS for share in DAMAGED}
    for (way, share), name in named.items():
        contenders[name] = _after_damage(kept, plain, share, lambda way=way: kept.repair(way), generator)  # type: ignore[misc]
    times = interleave(contenders, rounds, f"repair of {length} tokens")
    times["write"] = times["prefill that writes"] - times["prefill"]
    rows = [row(name, length, depth, times, name, "prefill") | {"damaged": 0.0} for name in ("write", "check")]
    for (way, share), name in named.items():
        rows.append(row(way, length, depth, times, name, "prefill") | {"damaged": share})

    def step(cache: Cache) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(STEPS):
                position = torch.tensor([[int(cache.get_seq_length())]], device=ids.device)
                model(ids[:, :1], past_key_values=cache, position_ids=position)

        return steps

    contenders = {"plain step": timed(step(plain)), "decoding step": timed(step(kept))}
    times = interleave(contenders, rounds, f"decoding behind {length} tokens") / STEPS
    return [*rows, row("decoding step", length, depth, times, "decoding step", "plain step") | {"damaged": 0.0}]


def _after_damage(
    cache: SketchCache, sound: Cache, share: float, act: Callable[[], object], generator: torch.Generator
) -> Callable[[], float]:
    """A contender of `interleave`: what is done with a cache whose tokens, scattered, were damaged by noise."""
    layers: list[Any] = cache.layers
    clean: list[Any] = sound.layers
    record = cache.kept

    def contender() -> float:
        hit = torch.randperm(len(record), generator=generator)[: round(share * len(record))]
        cache.record = record
        for layer, own in zip(layers, clean, strict=True):
            for stored, numbers in ((layer.keys, own.keys), (layer.values, own.values)):
                stored.copy_(numbers)
                noise = torch.randn(*stored.shape[:2], len(hit), stored.shape[3], generator=generator)
                size = numbers.float().square().mean().sqrt()
                stored[:, :, hit] += (NOISE * size.cpu() * noise).to(stored)
        return timed(act)()

    return contender
