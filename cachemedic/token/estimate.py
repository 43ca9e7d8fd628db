"""The estimate of damaged tokens: what they most likely held, given what is known of them and what was read.

Under the joint model the numbers read deviate from those predicted (by the code, or by the prior) by

    d = axes (c - predicted c) + rest + noise,

all of it normal. The noise of each part of a token has a size of its own; numbers that are lost (zero, not finite, far
off) say nothing. Rounds of estimating the noise from what c leaves unexplained, and of one step of conjugate gradients
(Polak and Ribiere 1969) toward the most likely c, are followed by one weighted mean a number of what was read and what
c says. Noise is estimated number by number as they are stored, keys rotated, because there it is independent. Numbers
that were rounded have no noise but bounds: of them the means of normal variables within their bounds are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cachemedic.token.parts import DeviationModel
from cachemedic.token.rounded import within
from cachemedic.token.scratch import Scratch
from cachemedic.token.vectors import Angles

OUTLIER = 5.0  # standard deviations from which on a number is lost
HALF_MOMENT = 0.822179  # E |x|^(1/2) of a standard normal variable
FLOOR = 0.03  # of the variance that a number counts with in the search for c, over the mean power: a good condition
FAINT = 0.01  # of the noise that is always there, over what is expected without any: what `Trust` can raise
TINY = 1e-6
STILL = 0.3  # of the weight that was given to what was read: with less of it left, the search for c begins anew
FAR = 1e4  # of a standardised number that is lost anyway: its square has to stay finite


@dataclass(frozen=True, eq=False)
class PartStatistics:
    """Statistics of parts [B, T, P] after the first round, from which a network corrects their noise.

    deviation_power: mean squared deviation from the prediction, over what is expected of sound parts; residual_power:
    the same from what c says; lost: the share of numbers that say nothing; regression: the coefficient of what was read
    on what is predicted; power: of what was read, over that of what is predicted; exact: parts that are predicted
    exactly; sound: parts known to be as they were written; noise and variance: as the algebra has them now, of a
    number; residual [B, T, P, d]: what c leaves of the deviation; present [B, T, P, d]: 1 for numbers that are not
    lost, else 0.
    """

    deviation_power: Tensor
    residual_power: Tensor
    lost: Tensor
    regression: Tensor
    power: Tensor
    exact: Tensor
    sound: Tensor
    noise: Tensor
    variance: Tensor
    residual: Tensor
    present: Tensor


Trust = Callable[[PartStatistics], Tensor]  # what to add [B, T, P] to the logarithm of the noise


def estimate(
    deviations: DeviationModel,
    kind: Tensor,
    predicted: Tensor,
    read: Tensor,
    angles: Angles | None,
    rounds: int,
    trust: Trust | None = None,
    sound: Tensor | None = None,
    rounded: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """The estimate [B, T, D] of tokens [B, T, D] from what was `read` and `predicted`, in float32.

    kind [B, T]: of each token's prediction, a row of `deviations`; predicted: with keys as before their rotation; read,
    and what is returned: as stored; angles: of the keys; rounds: 1 or more; trust: corrects the noise (None: the
    algebra alone); sound [B, T, P]: parts known to be as they were written, which stay so; rounded [B, T, P]: how far
    numbers lie from those read, at most, 0 where that is not known; scratch: shared by calls that follow each other.
    Matrix products run in the number format of `predicted`.
    """
    scratch = Scratch() if scratch is None else scratch
    parts, kinds, axes = deviations.parts, kind.unique(), deviations.axes.to(predicted.dtype)
    kind = kinds[:, None] if len(kinds) == 1 else kind  # tokens of one kind share one row of the model
    left, exact, rest = deviations.left[kind], deviations.exact[kind], parts.split(deviations.rest[kind])
    sound = torch.zeros_like(read[..., :1], dtype=torch.bool) if sound is None else sound
    stored = parts.rotate_(_copied(predicted, scratch("stored", predicted)), angles, 1, scratch)
    known, bounded = sound, None  # parts without noise of an unknown size, and those of them that were rounded
    if rounded is not None:
        bounded = (rounded > 0) & ~exact
        known = sound | bounded
        half = (rounded[..., None] * parts.split(deviations.scale))[bounded]
    first, present, count, expected = _deviation(deviations, kind, stored, read, known, scratch)
    d, c, spare = first, torch.zeros_like(left), scratch("spare", first)
    from_prediction = _power(first, spare) / count
    least = (from_prediction - 2 * expected).clamp_min(0)  # what the prediction alone makes certain
    rest_present = torch.mul(rest, present, out=spare).sum(-1) / count
    noise, more = least, None
    usable = torch.mul(present, (~exact).float()[..., None], out=scratch("usable", first))
    floored = rest + FLOOR * deviations.power
    direction = before = slope = torch.zeros_like(c)
    total_before = torch.zeros_like(c[..., 0])
    left_now = left @ deviations.mass / parts.width
    own = None if bounded is None else floored.expand_as(d)[bounded]
    for number in range(rounds):
        whole = torch.add(floored, noise.where(~known, 0.0)[..., None], out=spare)
        w = torch.div(usable, whole, out=scratch("weights", first))
        pulled = torch.mul(w, d, out=spare)
        if own is not None:
            mean, spread = within(d[bounded], half, own)
            pulled[bounded] = mean / own
            w[bounded] = ((own - spread) / own.square()).clamp_min(TINY)
        weight = w.mean(-1)
        precision = left.reciprocal() + weight @ deviations.mass.T
        pull = parts.rotate_(pulled.flatten(-2), angles, -1, scratch)
        pull = _as(axes.dtype, pull, scratch("narrow", pull, axes.dtype))
        gradient = (pull @ axes.T).float() - c / left
        ahead, total = gradient / precision, weight.sum(-1)
        beta = ((gradient - before) * ahead).sum(-1) / slope.sum(-1).clamp_min(TINY) if number else slope.sum(-1)
        beta = beta.clamp(0, 1) * (total > STILL * total_before)  # else it would lead on to another token
        direction = ahead + beta[..., None] * direction
        before, slope, total_before = gradient, gradient * ahead, total
        product = torch.matmul(direction.to(axes.dtype), axes, out=scratch("narrow", stored, axes.dtype))
        product = _as(torch.float32, product, scratch("moved", stored))
        moved = parts.split(parts.rotate_(product, angles, 1, scratch))
        curvature = (direction.square() / left).sum(-1) + torch.mul(w, moved, out=spare).mul_(moved).sum((-2, -1))
        step = ((gradient * direction).sum(-1) / curvature.clamp_min(TINY))[..., None]
        c, d = c + step * direction, torch.addcmul(d, step[..., None], moved, value=-1, out=scratch("left", first))
        left_now = precision.reciprocal() @ deviations.mass / parts.width
        fitted = (weight * left_now).clamp(0, 0.9)  # the share of the noise that c has taken up
        unexplained = _power(torch.mul(present, d, out=spare), spare) / count / (1 - fitted)
        noise = torch.maximum((unexplained - rest_present).clamp_min(0), least)
        if trust is not None:
            if number == max(0, rounds - 2):
                t = parts.split(torch.mul(stored, deviations.scale, out=scratch("predicted", stored)))
                power = _power(t, spare) + TINY
                along = t.mul_(first).sum(-1) / power
                variance = rest.mean(-1) + left_now
                statistics = PartStatistics(
                    deviation_power=from_prediction / expected.clamp_min(TINY),
                    residual_power=unexplained / variance,
                    lost=1 - present.mean(-1),
                    regression=1 + along,
                    power=1 + 2 * along + (from_prediction * count - TINY) / power,
                    exact=exact.expand_as(noise),
                    sound=sound.expand_as(noise),
                    noise=noise + FAINT * expected,
                    variance=variance,
                    residual=d,
                    present=present,
                )
                more = trust(statistics).exp()
            if more is not None:
                noise = (noise + FAINT * expected) * more
    variance = torch.add(rest, left_now[..., None], out=scratch("weights", first))
    found = first - d  # what c says
    if bounded is not None:
        d[bounded] = within(d[bounded], half, variance[bounded])[0]
    whole = torch.add(variance, noise.where(~known, 0.0)[..., None], out=spare)
    believed = torch.mul(torch.div(variance, whole, out=spare), present, out=spare)
    updated = (sound | ~exact).float()[..., None]  # what is predicted exactly stays as predicted
    return found.addcmul_(believed, d).mul_(updated).flatten(-2).div_(deviations.scale).add_(stored)


def _deviation(
    deviations: DeviationModel, kind: Tensor, stored: Tensor, read: Tensor, sound: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deviations from the prediction, 0 for lost numbers, and which are not lost, 1 or 0, both [B, T, P, d].

    Also how many of a part are not lost, 1 or more, and the variance expected of those [B, T, P]. What is 1 or 0 is
    kept in float32: torch is slow where it has to turn a bool into a number first.
    """
    parts, spread, sure = deviations.parts, deviations.parts.split(deviations.spread[kind]), sound.float()[..., None]
    found = parts.split(_copied(read, scratch("deviation", stored)))
    there = _copied(found, scratch("spare", found)).ne_(0)
    d = found.sub_(parts.split(stored)).mul_(parts.split(deviations.scale))
    held, other = scratch("present", d), scratch("usable", d)
    # nothing is less than what is not a number
    present = torch.maximum(torch.abs(d, out=held).lt_(FAR).mul_(there), sure, out=held)
    d.nan_to_num_().mul_(present)
    squares = torch.square(d, out=other).div_(spread)
    roots = torch.add(squares, TINY, out=scratch("spare", d)).sqrt_().sqrt_()
    half = roots.mul_(present).sum(-1) / present.sum(-1).clamp_min(1)  # outliers hardly move it
    near = squares.lt_(OUTLIER**2 * (half / HALF_MOMENT).pow(4).clamp_min(1.0)[..., None])
    near = torch.maximum(near, sure, out=other)
    d.mul_(near), present.mul_(near)
    count = present.sum(-1).clamp_min(1)
    return d, present, count, torch.mul(spread, present, out=scratch("spare", d)).sum(-1) / count


def _power(x: Tensor, out: Tensor | None) -> Tensor:
    """The sum of squares of each part [..., d]."""
    return torch.square(x, out=out).sum(-1)


def _copied(x: Tensor, out: Tensor | None) -> Tensor:
    """x in float32, in memory of its own."""
    return x.to(torch.float32, copy=True) if out is None else out.copy_(x)


def _as(dtype: torch.dtype, x: Tensor, out: Tensor | None) -> Tensor:
    """x in a number format, as it is if it has that one."""
    if x.dtype == dtype:
        return x
    return x.to(dtype) if out is None else out.copy_(x)
