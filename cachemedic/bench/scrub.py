"""What families D and E cost on a model of random weights: writing the sketch, and a scrub, beside a prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from cachemedic.attention import protect
from cachemedic.bench.timing import interleave, median_ratio
from cachemedic.cache import stack_cache, unstack_cache
from cachemedic.operators import RepairOperator
from cachemedic.safeguards import WORD_BITS
from cachemedic.token_aware.operator import TokenAware, coordinates
from cachemedic.token_aware.scalar_codes import SCALE_LIMIT, allot_bits
from cachemedic.token_aware.scrub import Scrubber, positions_of
from cachemedic.token_aware.sketch_cache import SketchCache
from cachemedic.token_aware.sketch_code import SketchCode
from cachemedic.token_aware.transform import Transform

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
        scale=draw(layers, width).mul_(0.1).exp_(),
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


def uncalibrated(model: PreTrainedModel) -> TokenAware:
    """Family E for all layers, at work, with random statistics."""
    layers = range(model.config.num_hidden_layers)
    operator = RepairOperator.create("E", model.config, layers=layers, coordinates=COORDINATES, share=SHARE)
    assert isinstance(operator, TokenAware)
    transform = random_transform(operator)
    operator.attach(transform, random_code(operator, transform))
    torch.nn.init.ones_(operator.strength)
    return operator


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A contender of `interleave`: the work, timed."""

    def contender() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return contender


def row(operation: str, length: int, layers: int, times: pd.DataFrame, name: str, reference: str) -> dict[str, object]:
    """One line of a table: the times of a contender over those of its reference."""
    ratio = median_ratio(times[name], times[reference])
    return {
        "operation": operation,
        "positions": length,
        "layers": layers,
        "milliseconds": 1e3 * times[name].median(),
        "reference": reference,
        "reference_milliseconds": 1e3 * times[reference].median(),
        "ratio": ratio.estimate,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "rounds": len(times),
    }


def damaged(x: torch.Tensor, share: float, numbers: torch.Generator) -> torch.Tensor:
    """x [B, L, G, T, d] with noise of its own size on whole pages of tokens."""
    pages = -(-x.shape[3] // PAGE)
    hit = torch.zeros(pages, dtype=torch.bool)
    hit[torch.randperm(pages, generator=numbers)[: round(share * pages)]] = True
    noise = torch.randn(x.shape, generator=numbers) * x.square().mean().sqrt()
    return x + noise * hit.repeat_interleave(PAGE)[: x.shape[3], None]


@torch.inference_mode()
def scrub_cost(
    model: PreTrainedModel, length: int = LENGTH, hit: Sequence[float] = HIT, rounds: int = ROUNDS
) -> pd.DataFrame:
    """One row for each operation: a prefill that writes the sketch, a scrub of a cache with a share of damaged tokens,
    a decoding step that writes the sketch, and one behind a cache that was scrubbed; over a plain prefill or step.
    """
    operator = uncalibrated(model)
    scrubber = Scrubber(model, operator)
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=numbers)
    valid = torch.ones_like(ids, dtype=torch.bool)
    positions = positions_of(valid)

    def prefill(cache: Cache) -> Cache:
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def prefill_with_sketch() -> Cache:
        with protect(model, operator):
            return prefill(SketchCache(model, operator))

    plain, kept = prefill(DynamicCache()), prefill_with_sketch()
    k, v = stack_cache(plain)
    codes = scrubber.write(k, v, ids, valid)
    contenders = {"prefill": timed(lambda: prefill(DynamicCache())), "write": timed(prefill_with_sketch)}
    names = {f"scrub, {share:.0%} hit": share for share in hit}
    for name, share in names.items():
        bad = damaged(k, share, numbers), damaged(v, share, numbers)
        contenders[name] = timed(lambda bad=bad: scrubber.scrub(*bad, ids, positions, codes))
    times = interleave(contenders, rounds, f"scrubs of {length} tokens")
    layers = len(operator.layers)
    rows = [row("write the sketch in a prefill", length, layers, times, "write", "prefill")]
    rows += [row(name, length, layers, times, name, "prefill") for name in names]

    def step(cache: Cache) -> None:  # every one lengthens the cache by a token
        position = torch.tensor([[cache.get_seq_length()]])
        model(torch.tensor([[1]]), past_key_values=cache, position_ids=position)

    def step_with_sketch() -> None:
        with protect(model, operator):
            step(kept)

    mended = unstack_cache(*scrubber.scrub(*bad, ids, positions, codes)[:2])
    del bad, k, v
    steps = {"step": lambda: step(plain), "scrubbed": lambda: step(mended), "write": step_with_sketch}
    times = interleave({name: timed(work) for name, work in steps.items()}, 4 * rounds + 3, f"steps behind {length}")
    rows.append(row("decode behind a scrubbed cache", length, layers, times, "scrubbed", "step"))
    rows.append(row("write the sketch of a decoded token", length, layers, times, "write", "step"))
    return pd.DataFrame(rows)
