"""The estimate of damaged tokens: what they most likely held, given what is known of them and what was read.

Under the joint model the numbers read deviate from those told (by the code, or by the prior) by

    d = axes (c - told c) + rest + noise,

all of it normal. The noise of each part of a token has a size of its own; numbers that are lost (zero, not finite, far
off) say nothing. Rounds of judging the noise by what c leaves unexplained, and of one step of conjugate gradients
(Polak and Ribiere 1969) toward the most likely c, are followed by one weighted mean a number of what was read and what
c says. Noise is judged number by number as they are stored, keys rotated, because there it is independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cachemedic.token.parts import Knowledge
from cachemedic.token.vectors import Angles

OUTLIER = 5.0  # standard deviations from which on a number is lost
HALF_MOMENT = 0.822179  # E |x|^(1/2) of a standard normal variable
FLOOR = 0.03  # of the variance that a number counts with in the search for c, over the mean power: a good condition
FAINT = 0.01  # of the noise that is always there, over what is expected without any: what `Trust` can raise
TINY = 1e-6
FAR = 1e4  # of a standardised number that is lost anyway: its square has to stay finite


@dataclass(frozen=True, eq=False)
class Sight:
    """What is seen of parts [B, T, P] after the first round.

    told: mean squared deviation from what is told, over what is expected of sound parts; found: the same from what c
    says; lost: the share of numbers that say nothing; alike: the regression of what was read on what is told; size:
    its power over that of what is told; exact: parts that are told exactly; noise and variance: as the algebra
    has them now, of a number; left [B, T, P, d]: what c leaves of the deviation; seen [B, T, P, d]: numbers not lost.
    """

    told: Tensor
    found: Tensor
    lost: Tensor
    alike: Tensor
    size: Tensor
    exact: Tensor
    noise: Tensor
    variance: Tensor
    left: Tensor
    seen: Tensor


Trust = Callable[[Sight], Tensor]  # what to add [B, T, P] to the logarithm of the noise


def estimate(
    known: Knowledge,
    kind: Tensor,
    told: Tensor,
    read: Tensor,
    angles: Angles | None,
    rounds: int,
    trust: Trust | None = None,
    sound: Tensor | None = None,
) -> Tensor:
    """The estimate [B, T, D] of tokens read as `read` and told as `told` [B, T, D], all as stored, in float32.

    kind [B, T]: which kind of knowledge each token has; angles: of its keys; rounds: 1 or more; trust: judges the noise
    (None: the algebra alone); sound [B, T, P]: parts known to be as they were written, which stay so. Matrix products
    run in the number format of `told`.
    """
    parts, scale = known.parts, known.scale
    left, exact, rest = known.left[kind], known.exact[kind], parts.split(known.rest[kind])
    seen, d, spread = _deviation(known, kind, told, read, sound)
    count = seen.sum(-1).clamp_min(1)
    expected = (spread * seen).sum(-1) / count
    from_told = d.square().sum(-1) / count
    least = (from_told - 2 * expected).clamp_min(0)  # what the told numbers alone make certain
    noise, more = least, None
    usable = seen & ~exact[..., None]
    first, c = d, torch.zeros_like(left)
    direction = before = slope = torch.zeros_like(c)
    left_now = left @ known.mass / parts.width
    for number in range(rounds):
        noise = noise if sound is None else noise.where(~sound, 0.0)
        w = usable / (rest + noise[..., None] + FLOOR * known.power)
        precision = left.reciprocal() + w.mean(-1) @ known.mass.T
        gradient = _project(known, parts.rotate((w * d).flatten(-2), angles, -1), told.dtype) - c / left
        ahead = gradient / precision
        beta = ((gradient - before) * ahead).sum(-1) / slope.sum(-1).clamp_min(TINY) if number else slope.sum(-1)
        direction = ahead + beta.clamp(0, 1)[..., None] * direction
        before, slope = gradient, gradient * ahead
        moved = parts.split(parts.rotate(_expand(known, direction, told.dtype), angles, 1))
        curvature = (direction.square() / left).sum(-1) + (w * moved.square()).sum((-2, -1))
        step = ((gradient * direction).sum(-1) / curvature.clamp_min(TINY))[..., None]
        c, d = c + step * direction, d - step[..., None] * moved
        left_now = precision.reciprocal() @ known.mass / parts.width
        fitted = (w.mean(-1) * left_now).clamp(0, 0.9)  # the share of the noise that c has taken up
        unexplained = (seen * d.square()).sum(-1) / count / (1 - fitted)
        noise = torch.maximum((unexplained - (rest * seen).sum(-1) / count).clamp_min(0), least)
        if trust is not None:
            if number == max(0, rounds - 2):
                off = unexplained / (rest.mean(-1) + left_now)
                t = parts.split(told.float() * scale)
                power = t.square().sum(-1) + TINY
                sight = Sight(
                    told=from_told / expected.clamp_min(TINY),
                    found=off,
                    lost=1 - seen.float().mean(-1),
                    alike=1 + (t * first).sum(-1) / power,
                    size=(t + first).square().sum(-1) / power,
                    exact=exact,
                    noise=noise + FAINT * expected,
                    variance=rest.mean(-1) + left_now,
                    left=d,
                    seen=seen,
                )
                more = trust(sight).exp()
            if more is not None:
                noise = (noise + FAINT * expected) * more
    noise = noise if sound is None else noise.where(~sound, 0.0)
    variance = rest + left_now[..., None]
    believed = usable * (variance / (variance + noise[..., None]))
    if sound is not None:
        believed = believed.masked_fill(sound[..., None], 1.0)
    d = d.masked_fill(exact[..., None], 0.0)  # what is told exactly stays as it is told
    start = torch.where((seen & ~exact[..., None]).flatten(-2), read.float(), told.float())
    return start - ((1 - believed) * d).flatten(-2) / scale


def _deviation(
    known: Knowledge, kind: Tensor, told: Tensor, read: Tensor, sound: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers that are not lost [B, T, P, d], their deviations from what is told, and the variances of those."""
    parts = known.parts
    there = read.isfinite() & (read != 0)
    d = (torch.where(there, read, told).float() - told.float()) * known.scale
    d, seen, spread = parts.split(d), parts.split(there & (d.abs() < FAR)), parts.split(known.spread[kind])
    squares = (d.square() / spread).where(seen, 0.0)
    half = (squares + TINY).sqrt().sqrt().mul(seen).sum(-1) / seen.sum(-1).clamp_min(1)  # outliers hardly move it
    near = squares < OUTLIER**2 * (half / HALF_MOMENT).pow(4).clamp_min(1.0)[..., None]
    if sound is not None:
        seen, near = seen | sound[..., None], near | sound[..., None]
        d = parts.split((read.float() - told.float()) * known.scale).where(sound[..., None], d)
    seen = seen & near
    return seen, d.where(seen, 0.0), spread


def _project(known: Knowledge, z: Tensor, format: torch.dtype) -> Tensor:
    return (z.to(format) @ known.axes.to(format).T).float()


def _expand(known: Knowledge, c: Tensor, format: torch.dtype) -> Tensor:
    return (c.to(format) @ known.axes.to(format)).float()
