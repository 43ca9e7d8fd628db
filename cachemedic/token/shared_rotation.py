"""A rotation that the damaged tokens of a row share, undone before they are estimated.

Some quantisers store a cache in rotated coordinates (QuaRot, arXiv 2404.00456). Read without turning it back, it holds
x R in place of x, with one orthogonal R for all of its keys and one for all of its values. Many tokens together show R
although none of them does alone: of all orthogonal matrices it is the one that turns what was read nearest to what is
predicted (the orthogonal Procrustes problem, Schönemann 1966). R, the tokens and the parts that it hit are found in
turns. Where no rotation explains the damage nothing is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachemedic.token.joint import SINKS
from cachemedic.token.parts import Parts
from cachemedic.token.vectors import Angles

FITTED = 128  # tokens of a row, at most, that R is fitted to
ROUNDS = 4  # of R and of what it hit
EXPLAINED = 0.9  # of the squared distance from the prediction: what may be left of it
SLOPE = 0.85  # of what was turned back on its prediction, at least: that of a sound token is 1, of another one far less
LEAST, MOST = 0.25, 4.0  # of the power of a part, over that of its prediction: a rotation changes no lengths
EVIDENCE = 16  # parts of tokens, for each of the d numbers of a part, without which R is not known
HIT = 0.1  # of the parts of tokens, at least: one finds a rotation for any few of them


def undo_shared_rotation(
    read: Tensor,
    predicted: Tensor,
    angles: Angles | None,
    parts: Parts,
    positions: Tensor,
    sound: Tensor | None = None,
) -> Tensor:
    """What was `read` of tokens [B, T, D], without the rotation that many of a row share, if there is one.

    predicted [B, T, D]: what they are expected to hold, with keys as before the rotation by their `angles`; read: as
    stored. positions [B, T], -1 for padding; sound [B, T, P]: parts known to be as they were written, which stay so.
    """
    length, inner = read.shape[1], (positions >= SINKS)[:, None, :, None]
    free = torch.ones_like(inner) if sound is None else _by_side(sound, parts, 1)[..., 0] == 0
    some = torch.arange(min(length, FITTED), device=read.device) * length // min(length, FITTED)
    x, near = _by_side(read[:, some], parts), _by_side(_stored(predicted, angles, parts, some), parts)
    power, expected = _dot(x, x), _dot(near, near)
    usable = (power > LEAST * expected) & (power < MOST * expected) & (free & inner)[:, :, some]
    x.mul_(usable[..., None])  # the power of a huge number is not finite, and would be that of every sum
    power, alike = power.where(usable, 0.0), _dot(x, near)
    tokens, chosen = usable.any(3, keepdim=True), usable.any(2, keepdim=True)
    for _ in range(ROUNDS):
        rotation = _nearest_rotation(x, near, usable & tokens & chosen)
        turned_alike = _dot(x @ rotation[:, :, None], near)
        gained = (turned_alike - alike) * usable  # half of what the squared distance loses: no power changes
        tokens, chosen = (gained * chosen).sum(3, keepdim=True) > 0, (gained * tokens).sum(2, keepdim=True) > 0
    hit = usable & tokens & chosen
    along, before, size, own = (_over(side, hit) for side in (turned_alike, alike, expected, power))
    count = _over(torch.ones_like(power), hit)
    known = (own + size - 2 * along < EXPLAINED * (own + size - 2 * before)) & (along > SLOPE * size)
    known &= (count >= EVIDENCE * parts.width) & (count >= HIT * usable.sum((2, 3), keepdim=True))
    if not known.any():
        return read
    x, near = _by_side(read, parts), _by_side(_stored(predicted, angles, parts, slice(None)), parts)
    turned = x @ rotation[:, :, None]
    gained = _dot(turned, near) - _dot(x, near)
    tokens = (gained * (chosen & free)).sum(3, keepdim=True) > 0
    most = (tokens & inner).sum(2, keepdim=True) * 2 > inner.sum(2, keepdim=True)
    undone = torch.where(inner, tokens, most) & chosen & known & free  # of the first tokens too little is known
    return _together(torch.where(undone[..., None], turned, x), parts).to(read.dtype)


def _stored(predicted: Tensor, angles: Angles | None, parts: Parts, tokens: Tensor | slice) -> Tensor:
    """Some tokens [B, T', D] of a prediction in float32, as they are stored."""
    of_tokens = None if angles is None else (angles[0][:, tokens], angles[1][:, tokens])
    return parts.rotate_(predicted[:, tokens].to(torch.float32, copy=True), of_tokens, 1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each part [..., d]."""
    return (x * y).sum(-1)


def _over(x: Tensor, hit: Tensor) -> Tensor:
    """The sum of x [B, 2, T, P] over the parts that are hit, [B, 2, 1, 1]."""
    return (x * hit).sum((2, 3), keepdim=True)


def _by_side(x: Tensor, parts: Parts, width: int | None = None) -> Tensor:
    """Numbers [B, T, D] in float32 as [B, 2, T, L G, d], keys before values; what is not finite counts as zero."""
    whole = x.unflatten(-1, (parts.layers, 2, parts.heads, width or parts.width))
    return whole.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).float().nan_to_num(0.0, 0.0, 0.0)


def _together(x: Tensor, parts: Parts) -> Tensor:
    """The inverse of `_by_side`."""
    return x.unflatten(3, (parts.layers, parts.heads)).permute(0, 2, 3, 1, 4, 5).flatten(2)


def _nearest_rotation(x: Tensor, near: Tensor, hit: Tensor) -> Tensor:
    """R [B, 2, d, d], orthogonal, for which x R is nearest to `near` in the parts of tokens that are `hit`."""
    products = (x * hit[..., None]).flatten(2, 3).mT @ near.flatten(2, 3)
    left, _, right = torch.linalg.svd(products)
    return left @ right
