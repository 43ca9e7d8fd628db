"""Calibration of the transform of families D and E on clean caches of a base.

Text is documentation and generated reviews. Quantisers have a range, and text of a kind that calibration never saw may
lie outside of it, so that every kind that is to be repaired belongs into it; `calibrate` takes the windows of any text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from cachemedic.data.text import LABELS, sentiment_prompt, sentiment_review
from cachemedic.data.text_source import EMBEDDED_TEXT, TextSource
from cachemedic.data.windows import sample_windows
from cachemedic.defenses.defense import WORD_BITS
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.models.load import WEIGHTS, Base, check_format, load_base
from cachemedic.models.shape import ModelShape
from cachemedic.token.layerwise.learned_basis import learn_basis
from cachemedic.token.layerwise.operator import TokenAware
from cachemedic.token.layerwise.options import coordinates
from cachemedic.token.layerwise.sketch_code import SketchCode
from cachemedic.token.layerwise.statistics_files import TRANSFORM, shipped_transform
from cachemedic.token.layerwise.token_vectors import KeyRotation, join, split
from cachemedic.token.layerwise.transform import Transform, with_previous

RIDGE = 10.0
CHAIN_RANK = 128
BATCH = 8
DOCUMENTATION_SAMPLES, REVIEW_SAMPLES, CALIBRATION_LENGTH = 96, 24, 544
REVIEWS = 3000  # generated for the windows of reviews; other ones than those of any task
LEAST_POWER, LEAST_WEIGHT = 1e-6, 1e-8  # over the mean of a layer, or of all: what a dead or unread head counts
MEMORY = 4 << 30  # bytes that clean vectors may take: a large model is measured on fewer windows
CODE_SHARE = 4  # of the windows of each kind, one in so many measures the code
FISHER_SAMPLES, FISHER_PREFIX, FISHER_DECODED = 96, 128, 32


@dataclass(frozen=True, eq=False)
class CleanVectors:
    """Clean token vectors x [N, L, T, D] of N windows, their ids and their positions [N, T]."""

    x: Tensor
    ids: Tensor
    positions: Tensor


def calibration_windows(
    base: Base, code_alone: bool = False, seed: int = 5, source: TextSource = EMBEDDED_TEXT
) -> Tensor:
    """Windows of text [N, T], as long as the context allows: of documents, then of reviews.

    `code_alone`: only as many as a code takes, which has far fewer numbers than a transform. Of a large model as many
    as have their vectors in 4 GiB, at least one of each kind.
    """
    length = min(base.context - 32, CALIBRATION_LENGTH)
    rng = np.random.default_rng([seed, 13])
    drawn = source.reviews_of("operator_train") or [sentiment_review(rng) for _ in range(REVIEWS)]
    reviews = tuple(f"{sentiment_prompt(text)} {LABELS[label]}" for text, label in drawn)
    kinds = (source.documents_of("operator_train"), DOCUMENTATION_SAMPLES), (reviews, REVIEW_SAMPLES)
    shape = ModelShape.of(base.model.config)
    vector = 2 * shape.num_kv_heads * shape.head_dim * torch.float32.itemsize
    most = MEMORY / (length * shape.num_layers * vector)
    share = max(CODE_SHARE if code_alone else 1, (DOCUMENTATION_SAMPLES + REVIEW_SAMPLES) / most)
    return torch.cat([sample_windows(base, text, max(1, int(count / share)), length, seed) for text, count in kinds])


@torch.inference_mode()
def vectors_of(base: Base, ids: Tensor) -> CleanVectors:
    """Token vectors of windows ids [N, T] of any text."""
    rotation = KeyRotation(base.model)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    parts = []
    for rows in torch.arange(len(ids)).split(BATCH):
        cache = DynamicCache()
        base.model.base_model(ids[rows].to(base.model.device), past_key_values=cache, use_cache=True)
        x = join(*stack_cache(cache)).float()
        parts.append(rotation.at(positions[rows].to(x.device)).undo(x).cpu())
    return CleanVectors(torch.cat(parts), ids, positions)


def fit_transform(
    base: Base,
    vectors: CleanVectors,
    layers: Sequence[int],
    projection: str = "principal",
    seed: int = 0,
    text: Tensor | None = None,
) -> Transform:
    """The transform of some layers of a base.

    `scale` makes each head's vectors of unit size, then weighs a head by the fourth root of what an error in it does to
    the output (the diagonal of the Fisher information, averaged over the head; Amari 1998): the square root of the
    weight that would be exact for errors so small that they stay apart. `projection`: the principal axes of the
    innovation, or "random" orthonormal ones. `text`: see `fisher_diagonal`. Raises `ValueError` for another projection.
    """
    if projection not in ("principal", "random"):
        raise ValueError(f"projection must be 'principal' or 'random', not {projection!r}")
    head_dim = ModelShape.of(base.model.config).head_dim
    inner = [vectors.x[:, layer, 1:] for layer in layers]  # one layer at a time: of a large model they are gigabytes
    mean = torch.stack([x.mean((0, 1)) for x in inner])
    power = torch.stack([(x - m).square().mean((0, 1)) for x, m in zip(inner, mean, strict=True)])  # [P, D]

    def by_head(numbers: Tensor) -> Tensor:
        return numbers.unflatten(1, (-1, head_dim)).mean(-1, keepdim=True).expand(-1, -1, head_dim).flatten(1)

    power = by_head(power)
    size = power.clamp_min(LEAST_POWER * power.mean(-1, keepdim=True)).rsqrt()
    weight = by_head(fisher_diagonal(base, text)[list(layers)] / size.square())
    scale = size * (weight / weight.mean()).clamp_min(LEAST_WEIGHT).pow(0.25)
    generator = torch.Generator().manual_seed(seed)
    width = mean.shape[-1]
    rank = min(width, CHAIN_RANK)
    chain_in, chain_out = torch.zeros(len(layers), 2 * width, rank), torch.zeros(len(layers), rank, width)
    basis, variance, first = [], [], []
    z = torch.empty(0)
    for layer, place in enumerate(layers):
        z_below, z = z, (vectors.x[:, place] - mean[layer]) * scale[layer]
        first.append(z[:, 0].mean(0))
        own = z[:, 1:].reshape(-1, width)
        if layer:
            below = with_previous(z_below)[:, 1:].flatten(0, 1)
            chain_in[layer], chain_out[layer] = (x.half().float() for x in _reduced_rank(below, own, rank))
            own = own - below @ chain_in[layer] @ chain_out[layer]
        if projection == "principal":
            axes = torch.linalg.eigh(own.T @ own / len(own)).eigenvectors.flip(1)
        else:
            axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        basis.append(axes)
        variance.append((own @ axes).square().mean(0))
    return Transform(mean, scale, torch.stack(first), chain_in, chain_out, torch.stack(basis), torch.stack(variance))


def _reduced_rank(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The map of a rank from x [N, n] to y [N, k] of least squared error (reduced-rank regression, Izenman 1975)."""
    full = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]), x.T @ y)
    predicted = x @ full
    axes = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -rank:]
    return full @ axes, axes.T


def sensitivity_windows(base: Base, source: TextSource = EMBEDDED_TEXT, seed: int = 7) -> Tensor:
    """96 windows of 160 tokens [N, T] of the operators' training text."""
    length = FISHER_PREFIX + FISHER_DECODED
    return sample_windows(base, source.documents_of("operator_train"), FISHER_SAMPLES, length, seed)


def fisher_diagonal(base: Base, text: Tensor | None = None, seed: int = 7) -> Tensor:
    """Mean squared gradient [L, D] of log p(y) in each cached number, y drawn from the model: the Fisher diagonal.

    For the last 32 tokens of windows `text` [N, T], decoded on the cache of those before (None: those of
    `sensitivity_windows`).
    """
    text = sensitivity_windows(base, seed=seed) if text is None else text
    if text.shape[1] < FISHER_DECODED + 2:
        raise ValueError(
            f"windows of {text.shape[1]} tokens are too short to calibrate on: allowed are {FISHER_DECODED + 2} or more"
        )
    ids, prefix = text.to(base.model.device), text.shape[1] - FISHER_DECODED
    rotation = KeyRotation(base.model)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for rows in tqdm(ids.split(BATCH), desc=f"sensitivity of the cache of {base.name}"):
        positions = torch.arange(prefix, device=rows.device).expand(len(rows), -1)
        cache = DynamicCache()
        with torch.no_grad():
            base.model.base_model(rows[:, :prefix], past_key_values=cache, use_cache=True)
        key, value = stack_cache(cache)
        turn = rotation.at(positions)
        x = turn.undo(join(key, value)).requires_grad_()
        with torch.enable_grad():
            stored = unstack_cache(*split(turn.redo(x), key.shape[2]))
            log_p = base.model(rows[:, prefix:], past_key_values=stored).logits.float().log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1).cpu(), 1, generator=generator)
            log_p.gather(-1, drawn.to(log_p.device).view(*log_p.shape[:2], 1)).sum().backward()
        assert x.grad is not None
        total = total + x.grad[:, :, 1:].square().sum((0, 2)).cpu()
    return total / (len(ids) * FISHER_DECODED * (prefix - 1))


def calibrate(
    operator: TokenAware, base: Base, windows: CleanVectors | None = None, source: TextSource = EMBEDDED_TEXT
) -> TokenAware:
    """Gives an operator the transform of a base, and family E its code; returns it.

    All layers of an embedded base take the transform that ships, unless the `source` is text from outside. `windows`:
    clean vectors to measure on, of 34 tokens or more (None: those of `calibration_windows` of the `source`). Raises
    `ValueError` for an operator of another model, for too short windows, and for a base that rotates its keys in a way
    that is not served.
    """
    operator.check_model(base.model.config)
    check_format(base.model.dtype)
    options = operator.config.options
    everything = operator.layers == tuple(range(operator.config.model.num_layers))
    projection = options.get("projection", "principal")
    transform = shipped_transform(base.name) if everything and projection != "random" and not source else None
    if transform is None:
        _check_rotation(base)
        measured = windows or vectors_of(base, calibration_windows(base, source=source))
        text = windows.ids if windows else sensitivity_windows(base, source)
        axes = "random" if projection == "random" else "principal"
        transform = fit_transform(base, measured, operator.layers, axes, text=text)
    code = None
    if "share" in options:
        measured = windows or vectors_of(base, calibration_windows(base, code_alone=True, source=source))
        code = _code(operator, transform, measured)
        if projection == "learned":
            transform = learn_basis(base, code, operator.layers, operator.known_layers, source)
            code = _code(operator, transform, measured)
    operator.hold(transform, code)
    return operator


@torch.inference_mode()
def _check_rotation(base: Base) -> None:
    """Raises `ValueError` unless unrotated keys of the lowest layer tell the token alone, whatever its position.

    Some models pair the numbers of a key differently from what their angles suggest. (Without a rotary embedding
    positions enter the token's vector itself, and there is nothing to check.)
    """
    if KeyRotation(base.model).embedding is None:
        return
    token = base.model.config.get_text_config().vocab_size // 2  # no padding, whose embedding may be zero
    lowest = vectors_of(base, torch.full((1, 8), token)).x[0, 0]
    key = lowest[:, : lowest.shape[-1] // 2]
    if (key - key.mean(0)).norm() > 0.05 * key.norm():
        raise ValueError(
            f"{type(base.model).__name__} does not rotate number i of a key with number i + width / 2; token-aware "
            "repair serves models with that rotary embedding, or none"
        )


def _code(operator: TokenAware, transform: Transform, windows: CleanVectors) -> SketchCode:
    """The code of family E, measured on clean windows."""
    options = operator.config.options
    z = transform.standardise(windows.x[:, list(operator.layers)])
    budget = int(options["share"] * WORD_BITS * transform.width * transform.num_layers)
    is_first = windows.positions == 0
    m = coordinates(operator.config)
    return SketchCode.fit(transform, z, is_first, operator.known_layers, budget, m, options["bits"])


def ship(name: str) -> None:
    """Fits the transform of all layers of an embedded base and writes it beside the base's weights."""
    base = load_base(name)
    windows = vectors_of(base, calibration_windows(base))
    fit_transform(base, windows, range(base.model.config.num_hidden_layers)).save(WEIGHTS / name / TRANSFORM)


if __name__ == "__main__":
    ship(sys.argv[1])
