"""Calibration: the joint model of the tokens of a base, measured on clean caches of text.

Two passes over text: one for the sensitivity of the output to errors (the diagonal of the Fisher information), one for
the vectors themselves, of which at most `MEMORY` bytes are held and changed where they lie. Variances come from windows
that the axes have not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cachemedic.core.progress import tqdm
from cachemedic.core.threads import add_up, give_back, workers
from cachemedic.data.text_source import TextSource
from cachemedic.models.cache import unstack_cache
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.token.calibration_text import Texts, default_texts, source_texts, windows
from cachemedic.token.joint import RECENT, SINKS, JointModel
from cachemedic.token.joint_files import shipped_joint
from cachemedic.token.lowest_layer import lowest_layer
from cachemedic.token.principal_axes import principal_axes
from cachemedic.token.prior_fit import BLOCK, COLUMNS, PART, reduced_rank, take_prior, take_prior_of_others
from cachemedic.token.vectors import TokenVectors

COORDINATES, LARGEST_PART = 2000, 4  # m at most; and a part of the numbers of a token
MEMORY = 1 << 30  # bytes of clean vectors, in bf16
WINDOWS = 96  # at most
LENGTH, BATCH = 544, 4  # tokens of a window, windows at once
HELD_OUT = 8  # one window in so many measures variances
SENSITIVITY_WINDOWS, SENSITIVITY_PREFIX, SENSITIVITY_DECODED = 32, 128, 32
LEAST_POWER, LEAST_WEIGHT = 1e-6, 1e-8  # over the mean of all: what a dead or unread head counts


def joint_of(base: Base, layers: tuple[int, ...], source: TextSource) -> JointModel:
    """The joint model of some layers: the one that comes with the base, else measured on the text of `source`."""
    shipped = shipped_joint(base.name)
    if shipped is not None and shipped.layers == layers and not source:
        return shipped
    return fit_joint_model(base, source_texts(base, source), layers)


def fit_joint_model(
    base: Base,
    texts: Texts | None = None,
    layers: Sequence[int] | None = None,
    coordinates: int = COORDINATES,
    seed: int = 0,
) -> JointModel:
    """The joint model of the tokens of a base, for some layers (None: all).

    texts: strings, or lists of them by kind, which then count alike (None: `default_texts`). coordinates: m at most; no
    more than the text has tokens, or a quarter of the numbers of a token. The result depends on `seed` and, in the last
    digits, on the processor, but not on the number of threads: see `workers`.
    Raises `ValueError` for a base whose keys cannot be unrotated, and for too little text.
    """
    vectors = TokenVectors(base.model, layers)
    check_rotation(base, vectors)
    texts = default_texts(base, seed) if texts is None else texts
    length = min(base.context, LENGTH)
    count = min(WINDOWS, max(HELD_OUT, MEMORY // (2 * vectors.dim * (length - SINKS))))
    ids = windows(base, texts, count, length, seed)
    if len(ids) < 2:
        raise ValueError(
            f"the texts make {len(ids)} window of {length} tokens; calibration takes 2 or more, and serves well from "
            "some tens of thousands of tokens on"
        )
    with workers() as pool:
        sensitivity = pool.submit(fisher_diagonal, base, vectors, texts, seed)
        z, lowest, first = _clean(pool, base, vectors, ids)
        mean, scale = _standardise(pool, z, sensitivity.result(), vectors.head_dim)
        lowest_mean = lowest.flatten(0, 1).mean(0)
        lowest_scale = (lowest - lowest_mean).flatten(0, 1).std(0).clamp_min(LEAST_WEIGHT).reciprocal()
        lowest.sub_(lowest_mean).mul_(lowest_scale)

        def regressors(rows: Tensor) -> Tensor:  # what `recent` gives of them
            places = rows + (rows // (length - SINKS) + 1) * SINKS
            return lowest.flatten(0, 1)[places[:, None] - torch.arange(RECENT)].flatten(1)

        held_out = torch.arange(len(ids)) % min(HELD_OUT, len(ids)) == 0
        rows = torch.arange(len(z)).view(len(ids), -1)
        seen, unseen = rows[~held_out].flatten(), rows[held_out].flatten()
        prior = reduced_rank(pool, regressors, z, seen)
        take_prior_of_others(pool, z, regressors, seen, length - SINKS)
        prior_in, prior_out = (x.bfloat16() for x in prior.result())
        told = regressors(unseen) @ prior_in.float()
        take_prior(pool, z, unseen, told, prior_out)
        give_back()
        axes = principal_axes(pool, z, seen, min(coordinates, len(seen), max(1, vectors.dim // LARGEST_PART)), seed)
        c, rest = _spread(pool, z, unseen, axes.float())
    return JointModel(
        of=ModelShape.of(base.model.config),
        layers=vectors.layers,
        mean=mean,
        scale=scale,
        axes=axes,
        variance=c.square().mean(0),
        rest=rest,
        lowest_mean=lowest_mean,
        lowest_scale=lowest_scale,
        prior_in=prior_in,
        prior_out=prior_out,
        prior_variance=told.square().mean(0),
        first=first,
    )


@torch.inference_mode()
def check_rotation(base: Base, vectors: TokenVectors) -> None:
    """Raises `ValueError` unless unrotated keys of the lowest layer tell the token alone, whatever its position.

    Some models pair the numbers of a key differently from what their angles suggest. (Without a rotary embedding
    positions enter the token's vector itself, and there is nothing to check.)
    """
    if vectors.rotation.embedding is None:
        return
    token = base.model.config.get_text_config().vocab_size // 2  # no padding, whose embedding may be zero
    lowest = lowest_layer(base.model, torch.full((1, 8), token), torch.arange(8)[None])[0].float()
    key = lowest[:, : lowest.shape[-1] // 2]
    if (key - key.mean(0)).norm() > 0.05 * key.norm():
        raise ValueError(
            f"{type(base.model).__name__} does not rotate number i of a key with number i + width / 2; token-aware "
            "repair serves models with that rotary embedding, or none"
        )


def clean_caches(base: Base, ids: Tensor, batch: int = BATCH) -> Iterator[tuple[Tensor, DynamicCache]]:
    """Some windows of ids [n, T] at a time, and their caches."""
    for rows in ids.split(batch):
        cache = DynamicCache()
        rows = rows.to(base.model.device)
        with torch.inference_mode():
            base.model.base_model(rows, past_key_values=cache, use_cache=True)
        yield rows, cache


def _clean(pool: Executor, base: Base, vectors: TokenVectors, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Vectors [n (T - SINKS), D] of all tokens but the first, bf16, of the lowest layer of all [n, T, W], and [D] of
    the first token, where all windows begin with the same.
    """
    count, length = ids.shape
    x = torch.empty(count, length - SINKS, vectors.dim, dtype=torch.bfloat16)

    def write(batch: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        ((rows, cache),) = clean_caches(base, batch)
        positions = torch.arange(length, device=rows.device).expand(len(rows), -1)
        stored: list[Any] = [cache.layers[layer] for layer in vectors.layers]
        found = vectors.of([s.keys for s in stored], [s.values for s in stored], positions)
        out.copy_(found[:, SINKS:].cpu())
        return lowest_layer(base.model, rows, positions).float().cpu(), found[0, 0].float().cpu().clone()

    lowest, firsts = list[Tensor](), list[Tensor]()
    bar = tqdm(total=count, desc=f"clean caches of {base.name}")
    for low, first in pool.map(write, ids.split(BATCH), x.split(BATCH)):
        lowest.append(low)
        firsts.append(first)
        bar.update(len(low))
        give_back()
    bar.close()
    alike = bool((ids[:, 0] == ids[0, 0]).all())
    return x.flatten(0, 1), torch.cat(lowest), firsts[0] if alike else None


def _standardise(pool: Executor, x: Tensor, sensitivity: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Makes vectors x [N, D] in place what the axes are found for; returns mean and scale [D].

    The scale makes each head's vectors of unit size, then weighs a head by the fourth root of what an error in it does
    to the output (Amari 1998, averaged over the head): the square root of the weight that would be exact for errors so
    small that they stay apart.
    """
    blocks = x.split(BLOCK)
    mean = add_up(pool.map(lambda rows: rows.float().sum(0), blocks)) / len(x)
    power = add_up(pool.map(lambda rows: rows.float().sub_(mean).square_().sum(0), blocks)) / len(x)

    def by_head(numbers: Tensor) -> Tensor:
        return numbers.unflatten(0, (-1, head_dim)).mean(-1, keepdim=True).expand(-1, head_dim).flatten()

    power = by_head(power)
    size = power.clamp_min(LEAST_POWER * power.mean()).rsqrt()
    weight = by_head(sensitivity / size.square())
    scale = size * (weight / weight.mean()).clamp_min(LEAST_WEIGHT).pow(0.25)
    list(pool.map(lambda rows: rows.copy_(rows.float().sub_(mean).mul_(scale)), blocks))
    return mean, scale


def fisher_diagonal(base: Base, vectors: TokenVectors, texts: Texts, seed: int = 0) -> Tensor:
    """Mean squared gradient [D] of log p(y) in each number of a token, y drawn from the model: the Fisher diagonal.

    For the last 32 tokens of short windows, decoded on the cache of those before.
    """
    length = min(SENSITIVITY_PREFIX + SENSITIVITY_DECODED, base.context)
    prefix = length - SENSITIVITY_DECODED
    if prefix <= SINKS:
        raise ValueError(f"the context of {base.name}, {base.context} tokens, is too short to calibrate on")
    ids = windows(base, texts, SENSITIVITY_WINDOWS, length, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(vectors.dim)
    bar = tqdm(total=len(ids), desc=f"sensitivity of the cache of {base.name}")
    for rows in ids.split(BATCH):
        (_, cache), *_ = clean_caches(base, rows[:, :prefix])
        stored_layers: list[Any] = cache.layers
        layers = [(layer.keys, layer.values) for layer in stored_layers]
        positions = torch.arange(prefix, device=base.model.device).expand(len(rows), -1)
        protected = [layers[layer] for layer in vectors.layers]
        x = vectors.of([k for k, _ in protected], [v for _, v in protected], positions).clone().requires_grad_()
        with torch.enable_grad():
            for layer, key, value in zip(
                vectors.layers, *(side.unbind(1) for side in vectors.back(x, positions)), strict=True
            ):
                layers[layer] = key, value
            stored = unstack_cache(*(torch.stack(side, 1) for side in zip(*layers, strict=True)))
            logits = base.model(rows[:, prefix:].to(base.model.device), past_key_values=stored).logits
            log_p = logits.float().log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1).cpu(), 1, generator=generator)
            log_p.gather(-1, drawn.to(log_p.device).view(*log_p.shape[:2], 1)).sum().backward()
        assert x.grad is not None
        total += x.grad[:, SINKS:].float().square().sum((0, 1)).cpu()
        bar.update(len(rows))
    bar.close()
    return total / (len(ids) * SENSITIVITY_DECODED * (prefix - SINKS))


def _spread(pool: Executor, z: Tensor, rows: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates [n, m] of some rows of z [N, D], and the mean square [D] of what they leave."""
    c = torch.cat([*pool.map(lambda part: z[part].float() @ axes.T, rows.split(PART))])

    def rest(columns: Tensor, axes: Tensor) -> Tensor:
        blocks = zip(rows.split(BLOCK), c.split(BLOCK), strict=True)
        return add_up(columns[block].float().sub_(known @ axes).square_().sum(0) for block, known in blocks)

    return c, torch.cat([*pool.map(rest, z.split(COLUMNS, 1), axes.split(COLUMNS, 1))]) / len(rows)
