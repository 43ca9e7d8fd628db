"""Few-bit codes of real coordinates: Lloyd-Max quantisers, the allotment of bits by variance, and packing into bytes.

Each coordinate of a sketch has its own whole number of bits b >= 0 and is coded by the quantiser of least mean squared
error for a normal variable of its standard deviation (Lloyd 1982, Max 1960). Bits go where they lower the total error
most, the greedy form of reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3.3).
"""

from __future__ import annotations

import heapq
from functools import cache

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

MAX_BITS = 8
COMPARED_BITS = 4  # up to which it is quicker to compare with every threshold than to search among them
SCALE_LIMIT = 1e-2  # a coordinate that varies less counts as one of this standard deviation: rounding stays far below


@cache
def lloyd_max(bits: int) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Levels, thresholds and mean squared error of the best 2**bits-level quantiser of a standard normal variable."""
    levels = 3**0.5 * norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)  # the optimum for many levels: a near start
    for _ in range(500):  # to the fixed point: thresholds halfway, levels at the mean of their cell
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = norm.cdf(edges[1:]) - norm.cdf(edges[:-1])
        levels = (norm.pdf(edges[:-1]) - norm.pdf(edges[1:])) / mass
    return tuple(levels), tuple((levels[1:] + levels[:-1]) / 2), float(1 - (mass * levels**2).sum())


@cache
def distortion(bits: int) -> float:
    """Mean squared error that is left of a unit variance after coding with `bits` bits."""
    return lloyd_max(bits)[2]


def allot_bits(variances: Tensor, budget: int) -> Tensor:
    """Whole bits for coordinates of these variances (any shape), `budget` in all at most: the largest gain first.

    Raises `ValueError` for a negative budget.
    """
    if budget < 0:
        raise ValueError(f"a budget of {budget} bits is out of range: 0 or more")
    flat = variances.flatten().tolist()
    bits = [0] * len(flat)
    gain = [distortion(b) - distortion(b + 1) for b in range(MAX_BITS)]
    queue = [(-variance * gain[0], i) for i, variance in enumerate(flat) if variance > 0]
    heapq.heapify(queue)
    for _ in range(budget):
        if not queue:
            break
        _, i = heapq.heappop(queue)
        bits[i] += 1
        if bits[i] < MAX_BITS:
            heapq.heappush(queue, (-flat[i] * gain[bits[i]], i))
    return torch.tensor(bits).view(variances.shape)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For b = 0 .. MAX_BITS: levels [b, code], and thresholds [b, code + 1] with the cell's ends -inf and inf."""
    size = 2**MAX_BITS
    levels = torch.zeros(MAX_BITS + 1, size)
    edges = torch.full((MAX_BITS + 1, size + 1), torch.inf)
    edges[:, 0] = -torch.inf
    for b in range(1, MAX_BITS + 1):
        own_levels, thresholds, _ = lloyd_max(b)
        levels[b, : 2**b] = torch.tensor(own_levels)
        edges[b, 1 : 2**b] = torch.tensor(thresholds)
    return levels.to(device), edges.to(device)


def encode(y: Tensor, bits: Tensor) -> Tensor:
    """Codes of coordinates y [..., m] in units of their standard deviations, uint8; bits [m]."""
    _, edges = _tables(y.device)
    codes = torch.zeros(y.shape, dtype=torch.uint8, device=y.device)
    for b in range(1, int(bits.max()) + 1 if len(bits) else 0):
        own = (bits == b).nonzero().squeeze(1)
        if not len(own):
            continue
        numbers, thresholds = y[..., own].float(), edges[b, 1 : 2**b]
        if b <= COMPARED_BITS:
            codes[..., own] = sum((numbers > threshold).byte() for threshold in thresholds.tolist())
        else:
            codes[..., own] = torch.bucketize(numbers, thresholds).byte()
    return codes


def decode(codes: Tensor, bits: Tensor) -> Tensor:
    """The levels that codes [..., m] stand for, in units of the standard deviations; 0 where there is no bit."""
    levels, _ = _tables(codes.device)
    return levels.flatten()[codes.long() + bits * levels.shape[1]]


def pack(codes: Tensor, bits: Tensor) -> Tensor:
    """Codes [..., m] as bytes [..., ceil(sum(bits) / 8)], uint8: what a sketch takes in memory."""
    owner, place = _bit_places(bits)
    stream = (codes[..., owner] >> place.to(torch.uint8)) & 1
    stream = torch.nn.functional.pad(stream, (0, -len(owner) % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: Tensor) -> Tensor:
    """The inverse of `pack`: codes [..., m]."""
    owner, place = _bit_places(bits)
    stream = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    stream = stream.flatten(-2)[..., : len(owner)] << place.to(torch.uint8)
    codes = torch.zeros(*packed.shape[:-1], len(bits), dtype=torch.uint8, device=packed.device)
    return codes.index_add_(-1, owner, stream)


def _bit_places(bits: Tensor) -> tuple[Tensor, Tensor]:
    """For every bit of a token's stream: the coordinate it belongs to, and its place in that code."""
    owner = torch.repeat_interleave(torch.arange(len(bits), device=bits.device), bits)
    first = (bits.cumsum(0) - bits)[owner]
    return owner, torch.arange(len(owner), device=bits.device) - first
