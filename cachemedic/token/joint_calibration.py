"""Calibration: the joint model of the tokens of a base, measured on clean caches of text.

Two passes over text: one for the sensitivity of the output to errors (the diagonal of the Fisher information), one for
the vectors themselves, of which at most `MEMORY` bytes are held. Principal axes come from a randomised subspace
iteration (Halko, Martinsson and Tropp 2011) with a seeded start; variances from windows that the axes have not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cachemedic.core.progress import tqdm
from cachemedic.core.threads import one_thread
from cachemedic.data.text_source import TextSource
from cachemedic.models.cache import unstack_cache
from cachemedic.models.load import Base
from cachemedic.models.shape import ModelShape
from cachemedic.token.calibration_text import Texts, default_texts, source_texts, windows
from cachemedic.token.joint import SINKS, JointModel, recent
from cachemedic.token.joint_files import shipped_joint
from cachemedic.token.lowest_layer import lowest_layer
from cachemedic.token.vectors import TokenVectors

COORDINATES, LARGEST_PART = 2000, 4  # m at most; and a part of the numbers of a token
MEMORY = 1 << 30  # bytes of clean vectors, in bf16
WINDOWS = 96  # at most
LENGTH, BATCH = 544, 4  # tokens of a window, windows at once
HELD_OUT = 8  # one window in so many measures variances
OVERSAMPLED, ITERATIONS, BLOCK = 48, 2, 4096  # of the subspace iteration; rows at once
RIDGE = 0.001  # of the prior, over the mean power of what it is linear in
FOLDS = 4  # of the windows: what ids leave of one is what a prior of the others leaves
PRIOR_RANK = 256  # of what the ids tell: each costs a restored token as much as a coordinate
SENSITIVITY_WINDOWS, SENSITIVITY_PREFIX, SENSITIVITY_DECODED = 32, 128, 32
LEAST_POWER, LEAST_WEIGHT = 1e-6, 1e-8  # over the mean of all: what a dead or unread head counts


def joint_of(base: Base, layers: tuple[int, ...], source: TextSource) -> JointModel:
    """The joint model of some layers: the one that comes with the base, else measured on the text of `source`."""
    shipped = shipped_joint(base.name)
    if shipped is not None and shipped.layers == layers and not source:
        return shipped
    return fit_joint_model(base, source_texts(base, source), layers)


@one_thread()
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
    digits, on the processor, but not on the number of threads: it computes on one.
    Raises `ValueError` for a base whose keys cannot be unrotated, and for too little text.
    """
    vectors = TokenVectors(base.model, layers)
    check_rotation(base, vectors)
    texts = default_texts(base, seed) if texts is None else texts
    length = min(base.context, LENGTH)
    count = min(WINDOWS, max(HELD_OUT, MEMORY // (2 * vectors.dim * (length - SINKS))))
    ids = windows(base, texts, count, length, seed)
    if len(ids) < 2:
        raise ValueError(f"the texts make {len(ids)} window of {length} tokens; calibration takes 2 or more")
    sensitivity = fisher_diagonal(base, vectors, texts, seed)
    z, lowest, first = _clean(base, vectors, ids)
    mean, scale = _standardise(z, sensitivity, vectors.head_dim)
    held_out = torch.arange(len(ids)) % min(HELD_OUT, len(ids)) == 0
    tokens = z.view(len(ids), length - SINKS, -1)
    seen, unseen = (tokens[rows].flatten(0, 1) for rows in (~held_out, held_out))
    del z, tokens
    lowest_mean = lowest.flatten(0, 1).mean(0)
    lowest_scale = (lowest - lowest_mean).flatten(0, 1).std(0).clamp_min(LEAST_WEIGHT).reciprocal()
    regressors = recent((lowest - lowest_mean) * lowest_scale)[:, SINKS:]
    seen_in, unseen_in = (regressors[rows].flatten(0, 1) for rows in (~held_out, held_out))
    prior_in, prior_out = (x.bfloat16() for x in _reduced_rank(seen_in, seen))
    _take_prior(unseen, unseen_in @ prior_in.float(), prior_out)
    take_prior_of_others(seen, seen_in, length - SINKS)
    axes = principal_axes(seen, min(coordinates, len(seen), max(1, vectors.dim // LARGEST_PART)), seed)
    c = _project(unseen, axes)
    rest = torch.zeros(vectors.dim)
    for rows in torch.arange(len(unseen)).split(BLOCK):
        rest += (unseen[rows].float() - c[rows] @ axes.float()).square().sum(0)
    return JointModel(
        of=ModelShape.of(base.model.config),
        layers=vectors.layers,
        mean=mean,
        scale=scale,
        axes=axes,
        variance=c.square().mean(0),
        rest=rest / len(unseen),
        lowest_mean=lowest_mean,
        lowest_scale=lowest_scale,
        prior_in=prior_in,
        prior_out=prior_out,
        prior_variance=(unseen_in @ prior_in.float()).square().mean(0),
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


def _clean(base: Base, vectors: TokenVectors, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Vectors [n (T - SINKS), D] of all tokens but the first, bf16, of the lowest layer of all [n, T, W], and [D] of
    the first token, where all windows begin with the same.
    """
    count, length = ids.shape
    x = torch.empty(count, length - SINKS, vectors.dim, dtype=torch.bfloat16)
    lowest, first, done = list[Tensor](), None, 0
    bar = tqdm(total=count, desc=f"clean caches of {base.name}")
    for rows, cache in clean_caches(base, ids):
        positions = torch.arange(length, device=rows.device).expand(len(rows), -1)
        stored: list[Any] = [cache.layers[layer] for layer in vectors.layers]
        found = vectors.of([s.keys for s in stored], [s.values for s in stored], positions)
        x[done : done + len(rows)] = found[:, SINKS:].cpu()
        first = found[0, 0].float().cpu() if first is None else first
        lowest.append(lowest_layer(base.model, rows, positions).float().cpu())
        done += len(rows)
        bar.update(len(rows))
    bar.close()
    alike = bool((ids[:, 0] == ids[0, 0]).all())
    return x.flatten(0, 1), torch.cat(lowest), first if alike else None


def _standardise(x: Tensor, sensitivity: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Makes vectors x [N, D] in place what the axes are found for; returns mean and scale [D].

    The scale makes each head's vectors of unit size, then weighs a head by the fourth root of what an error in it does
    to the output (Amari 1998, averaged over the head): the square root of the weight that would be exact for errors so
    small that they stay apart.
    """
    mean = sum(rows.float().sum(0) for rows in x.split(BLOCK)) / len(x)  # type: ignore[operator]
    power = sum((rows.float() - mean).square().sum(0) for rows in x.split(BLOCK)) / len(x)  # type: ignore[operator]

    def by_head(numbers: Tensor) -> Tensor:
        return numbers.unflatten(0, (-1, head_dim)).mean(-1, keepdim=True).expand(-1, head_dim).flatten()

    power = by_head(power)
    size = power.clamp_min(LEAST_POWER * power.mean()).rsqrt()
    weight = by_head(sensitivity / size.square())
    scale = size * (weight / weight.mean()).clamp_min(LEAST_WEIGHT).pow(0.25)
    for rows in x.split(BLOCK):
        rows.copy_((rows.float() - mean) * scale)
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


def principal_axes(z: Tensor, count: int, seed: int) -> Tensor:
    """The first principal axes [count, D] of rows z [N, D], bf16, orthonormal up to rounding.

    Products run in float32: processors without instructions for bf16 take sixty times as long for them.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(count + OVERSAMPLED, *z.shape)
    basis = torch.randn(z.shape[1], width, generator=generator)
    for _ in tqdm(range(ITERATIONS), desc="principal axes"):
        wide = torch.zeros_like(basis)
        for rows in z.split(BLOCK):
            block = rows.float()
            wide += block.T @ (block @ basis)
        basis = torch.linalg.qr(wide).Q
    gram = torch.zeros(width, width)
    for rows in z.split(BLOCK):
        found = rows.float() @ basis
        gram += found.T @ found
    turn = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
    axes = (basis @ turn).T
    sign = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # an axis has no direction of its own
    return (axes * sign).bfloat16().contiguous()


def _project(z: Tensor, axes: Tensor) -> Tensor:
    """Coordinates [N, m] of rows z [N, D]."""
    return torch.cat([rows.float() @ axes.float().T for rows in z.split(BLOCK)])


def _reduced_rank(regressors: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The map of low rank from regressors [N, n] to rows z [N, D] of least squared error (Izenman 1975)."""
    gram, products = regressors.T @ regressors, torch.zeros(regressors.shape[1], z.shape[1])
    for rows in torch.arange(len(z)).split(BLOCK):
        products += regressors[rows].T @ z[rows].float()
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    full = torch.linalg.solve(gram + ridge, products)
    root = torch.linalg.cholesky((gram + ridge).double()).T  # |root full| is |regressors full|, but for the ridge
    axes = torch.linalg.svd(root.float() @ full, full_matrices=False).Vh[:PRIOR_RANK]
    return full @ axes.T, axes


def _take_prior(z: Tensor, features: Tensor, prior_out: Tensor) -> None:
    """Leaves of rows z [N, D], in place, what features [N, r] do not tell."""
    for rows, told in zip(z.split(BLOCK), features.split(BLOCK), strict=True):
        rows.copy_(rows.float() - told @ prior_out.float())


def take_prior_of_others(z: Tensor, regressors: Tensor, length: int) -> None:
    """The same of windows of `length` rows, each by a prior that has not seen it.

    A prior tells too much of its own rows, above all of rare tokens, for which no axes would then be left.
    """
    fold = torch.arange(len(z)) // length % FOLDS
    if len(fold.unique()) < 2:
        fold = torch.arange(len(z)) % 2  # of a single window every other token
    priors = [_reduced_rank(regressors[fold != number], z[fold != number]) for number in fold.unique()]
    for number, (prior_in, prior_out) in zip(fold.unique(), priors, strict=True):
        part = z[fold == number]
        _take_prior(part, regressors[fold == number] @ prior_in, prior_out)
        z[fold == number] = part
