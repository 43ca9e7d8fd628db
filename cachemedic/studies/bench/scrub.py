"""What families D and E cost on a model of random weights: writing the sketch, and a scrub, beside a prefill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from cachemedic.defenses.defense import WORD_BITS
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.repair.attach import protect
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.bench.timing import interleave, row, timed
from cachemedic.token.layerwise.operator import TokenAware
from cachemedic.token.layerwise.options import coordinates
from cachemedic.token.layerwise.sketch_cache import SketchCache
from cachemedic.token.layerwise.sketch_code import SketchCode
from cachemedic.token.layerwise.transform import Transform
from cachemedic.token.scalar_codes import SCALE_LIMIT, allot_bits

CHAIN_RANK = 128
COORDINATES, SHARE = 4, 1 / 64
HIT = (0.0, 0.01, 0.1, 1.0)  # shares of damaged tokens
PAGE = 16  # tokens that are damaged together
LENGTH = 4096
ROUNDS = 7


def random_transform(operator: TokenAware, seed: int = 0) -> Transform:
    """A transform of the shapes that calibration gives, of random numbers: as much work as a measured one."""
    numbers = torch.Generator().manual_seed(seed)
    layers, width = len(operator.layers), 2 * operator.config.model.num_kv_heads * operator.head_dim
    rank = min(width // 2, CHAIN_RANK)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers)

    into = draw(layers, 2 * width, rank) / (2 * width) ** 0.5
    into[0] = 0  # below the lowest layer there is nothing
    return Transform(
        mean=0.1 * draw(layers, width),
        scale=draw(layers, width // operator.head_dim).mul_(0.1).exp_().repeat_interleave(operator.head_dim, 1),
        first=draw(layers, width),
        chain_in=into,
        chain_out=0.5 * draw(layers, rank, width) / rank**0.5,
        basis=torch.linalg.qr(draw(width, width)).Q.expand(layers, -1, -1),
        variance=torch.linspace(1, 0.1, width).square().expand(layers, -1),
    )


def random_code(operator: TokenAware, transform: Transform) -> SketchCode:
    """A code of the operator's bytes for that transform."""
    variance = transform.variance[:, : coordinates(operator.config)].clone()
    variance[: operator.known_layers] = 0
    budget = int(operator.config.options["share"] * WORD_BITS * transform.width * transform.num_layers)
    return SketchCode(transform, allot_bits(variance, budget), variance.sqrt().clamp_min(SCALE_LIMIT))


def uncalibrated(model: PreTrainedModel, family: str = "layerwise-E", **options: Any) -> TokenAware:
    """Family D or E for all layers, at work, with random statistics."""
    layers = range(model.config.num_hidden_layers)
    options |= {"coordinates": COORDINATES} | ({"share": SHARE} if family == "layerwise-E" else {})
    operator = RepairOperator.create(family, model.config, layers=layers, **options)
    assert isinstance(operator, TokenAware)
    transform = random_transform(operator)
    operator.hold(transform, random_code(operator, transform) if family == "layerwise-E" else None)
    torch.nn.init.ones_(operator.strength)
    return operator


def damage(cache: Cache, share: float) -> None:
    """Adds noise of their own size to keys and values of whole pages of tokens, a share of all, in place."""
    numbers, length = torch.Generator().manual_seed(0), cache.get_seq_length()
    pages = -(-length // PAGE)
    hit = torch.zeros(pages, dtype=torch.bool)
    hit[torch.randperm(pages, generator=numbers)[: round(share * pages)]] = True
    tokens = hit.repeat_interleave(PAGE)[:length].nonzero()[:, 0]
    layers: list[Any] = cache.layers
    for x in (side for layer in layers for side in (layer.keys, layer.values)):
        stored = x[:, :, tokens]
        x[:, :, tokens] = stored + torch.randn(stored.shape, generator=numbers) * x.square().mean().sqrt()


def scrubbing(cache: SketchCache, sound: Cache, share: float) -> Callable[[], float]:
    """A contender of `interleave`: the scrub of a cache, timed, after it was damaged."""

    pairs: Iterable[tuple[Any, Any]] = list(zip(cache.layers, sound.layers, strict=True))

    def contender() -> float:
        for layer, own in pairs:
            layer.keys.copy_(own.keys)
            layer.values.copy_(own.values)
        damage(cache, share)
        return timed(cache.scrub)()

    return contender


@torch.inference_mode()
def scrub_cost(
    model: PreTrainedModel, length: int = LENGTH, hit: Sequence[float] = HIT, rounds: int = ROUNDS
) -> pd.DataFrame:
    """One row for each operation: a prefill that writes the sketch, a scrub of a cache with a share of damaged tokens,
    by the estimator or the quick repair, a decoding step that writes the sketch, and one behind a cache that was
    scrubbed; over a plain prefill or step.
    """
    operators = {"scrub": uncalibrated(model), "quick scrub": uncalibrated(model, rounds=0)}
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=numbers)

    def prefill(cache: Cache) -> Cache:
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def prefill_with_sketch(operator: TokenAware) -> SketchCache:
        cache = SketchCache(model, operator)
        with protect(model, operator):
            prefill(cache)
        return cache

    plain = prefill(DynamicCache())
    kept = {name: prefill_with_sketch(operator) for name, operator in operators.items()}
    contenders = {
        "prefill": timed(lambda: prefill(DynamicCache())),
        "write": timed(lambda: prefill_with_sketch(operators["scrub"])),
    }
    names = [(f"{name}, {share:.0%} hit", name, share) for name in kept for share in hit]
    contenders |= {label: scrubbing(kept[name], plain, share) for label, name, share in names}
    times = interleave(contenders, rounds, f"scrubs of {length} tokens")
    layers = model.config.num_hidden_layers
    rows = [row("write the sketch in a prefill", length, layers, times, "write", "prefill")]
    rows += [row(label, length, layers, times, label, "prefill") for label, _, _ in names]

    def step(cache: Cache) -> None:  # every one lengthens the cache by a token
        position = torch.tensor([[cache.get_seq_length()]])
        model(torch.tensor([[1]]), past_key_values=cache, position_ids=position)

    def step_with_sketch() -> None:
        with protect(model, operators["scrub"]):
            step(kept["scrub"])

    mended = unstack_cache(*stack_cache(kept["quick scrub"]))
    steps = {"step": lambda: step(plain), "scrubbed": lambda: step(mended), "write": step_with_sketch}
    times = interleave({name: timed(work) for name, work in steps.items()}, 4 * rounds + 3, f"steps behind {length}")
    rows.append(row("decode behind a scrubbed cache", length, layers, times, "scrubbed", "step"))
    rows.append(row("write the sketch of a decoded token", length, layers, times, "write", "step"))
    return pd.DataFrame(rows)
