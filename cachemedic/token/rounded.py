"""Numbers that were rounded to few levels: which they are, and what that says of them.

A head whose numbers were stored in few bits holds multiples of one step, zeros among them. Many tokens together show
the step. Each number is then known to lie within half a step of what was read: a bound, not noise of an unknown size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cachemedic.token.parts import Parts

SAMPLED = 128  # tokens of a row, at most, that show the step
ZEROS = 0.1  # of them hold a zero where a part was rounded; numbers as they were written are never exactly zero
FEW = 4  # times as many numbers as levels, at least
OFF = 0.1  # of a step: how far a multiple of it may lie from where it belongs, rounded once more to bf16
EVIDENCE, SHARE = 16, 0.5  # of the numbers on few levels that are not zero: so many, and this share, are multiples
LEAST_BOUND = -12.0  # standard deviations: a bound further away says nothing
NARROW = 0.05  # standard deviations: in a narrower cell all numbers are as likely


def half_steps(read: Tensor, parts: Parts, sound: Tensor | None = None) -> Tensor | None:
    """How far numbers may lie from those `read` [B, T, D], of each part of a token: half the step [B, T, P].

    Zero for parts that were not rounded, or are known to be as they were written (sound [B, T, P]). None if no part is.
    """
    x = parts.split(read)
    length = x.shape[1]
    some = torch.arange(min(length, SAMPLED), device=read.device) * length // min(length, SAMPLED)
    row, part = ((x[:, some] == 0).any(-1).float().mean(1) >= ZEROS).nonzero(as_tuple=True)
    if not len(row):
        return None
    by_part = x.transpose(1, 2)
    sample = by_part[row, part][:, some].float().abs()  # [n, S, d]
    levels = 1 + (sample.sort(-1).values.diff(dim=-1) > 0).sum(-1)
    few = (levels * FEW <= parts.width) & sample.isfinite().all(-1)
    step = torch.where(few[..., None] & (sample > 0), sample, torch.inf).amin((1, 2))
    counted = ((sample > 0) & few[..., None]).sum(-1)
    shown = (counted * _are_multiples(sample, step)).sum(1)
    known = step.isfinite() & (shown >= EVIDENCE) & (shown >= SHARE * counted.sum(1))
    if not known.any():
        return None
    row, part, step = row[known], part[known], step[known]
    on_levels = _are_multiples(by_part[row, part].float().abs(), step)
    found = torch.zeros(x.shape[:-1], device=read.device)
    found.transpose(1, 2)[row, part] = on_levels * step[:, None] / 2
    return found if sound is None else found.masked_fill_(sound, 0.0)


def _are_multiples(numbers: Tensor, step: Tensor) -> Tensor:
    """Whether all of a token's numbers [n, T, d] are multiples of the step [n]."""
    place = numbers / step[:, None, None]
    return ((place - place.round()).abs() < OFF).all(-1)  # what is not finite is not near anything


def within(middle: Tensor, half: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of normal numbers about zero, of a `variance`, that lie within `half` of `middle`."""
    size = variance.sqrt()
    low, width = ((middle.abs() - half) / size).clamp_min(LEAST_BOUND), 2 * half / size
    high = low + width  # beyond the mean, as seen from the nearer bound
    fall = torch.exp(-width * (low + width / 2))
    root = math.sqrt(0.5)
    mass = math.sqrt(math.pi / 2) * (torch.special.erfcx(root * low) - fall * torch.special.erfcx(root * high))
    mean = (1 - fall) / mass
    spread = (1 + (low - high * fall) / mass - mean.square()).clamp(0, 1)
    narrow = width < NARROW
    mean = torch.where(narrow, low + width / 2, mean)
    spread = torch.where(narrow, width.square() / 12, torch.minimum(spread, width.square() / 12))
    return torch.copysign(mean * size, middle), spread * variance
