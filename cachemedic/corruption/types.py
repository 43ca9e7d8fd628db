"""The corruption types: one rule each, from stored tensors to damaged ones, and the range of its parameter.

Threat model of the public CacheMedic++ protocol (Uyar 2026, doi 10.5281/zenodo.18669268); every rule but `none` is one
function, so that a new type is one function and one line of `TYPES`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

BITFLIP_JUMP = 8.0  # a flipped exponent bit, roughly: the element moves by this many times its magnitude
BITFLIP_FLOOR = 1e-3  # the magnitude that an element near zero counts as
ROTATION_SEED_TRAIN = 0
ROTATION_SEED_TEST = 1  # evaluation rotates by a matrix that no operator was trained on


@dataclass(frozen=True)
class Stored:
    """What a rule sees of one sample of one tensor, K or V."""

    x: torch.Tensor  # [L, G, T, d] in at least fp32
    parameter: float
    hit: torch.Tensor  # [L, G, T, 1] bool: the entries that will be replaced
    generator: torch.Generator
    donor: torch.Tensor | None  # [L, G, T, d]
    rotation_seed: int
    is_key: bool
    offset: int  # how many positions off a stale page was

    def draw(self, sampler: Callable[..., torch.Tensor]) -> torch.Tensor:
        """`torch.rand` or `torch.randn` in the shape of `x`, drawn where the generator lives."""
        drawn = sampler(self.x.shape, generator=self.generator, device=self.generator.device, dtype=torch.float32)
        return drawn.to(self.x)


def gaussian(stored: Stored) -> torch.Tensor:
    """x + eps * rms(x) * N(0, 1), rms per (head, position) vector."""
    rms = stored.x.square().mean(-1, keepdim=True).sqrt()
    return stored.draw(torch.randn).mul_(rms * stored.parameter).add_(stored.x)


def dropout_zero(stored: Stored) -> torch.Tensor:
    """Each element is zero with probability p."""
    kept = stored.draw(torch.rand).ge_(stored.parameter)  # 0 or 1; a product is far faster than a boolean mask
    return kept.mul_(stored.x)


def orthogonal_rotation(stored: Stored) -> torch.Tensor:
    """x @ R^theta."""
    return stored.x @ rotation(stored.rotation_seed, stored.x.shape[-1], stored.parameter).to(stored.x)


def bitflip_sparse(stored: Stored) -> torch.Tensor:
    """An element is picked with probability p: half change sign, half jump up or down by 8 times their magnitude."""
    p = stored.parameter
    u = stored.draw(
        torch.rand
    ).flatten()  # one draw decides whether and how: [0, p/4) up, [p/4, p/2) down, [p/2, p) sign
    result = stored.x.flatten().clone()
    picked = (u < p).nonzero().squeeze(1)
    x, u = result[picked], u[picked]
    jump = x.abs().clamp_(min=BITFLIP_FLOOR).mul_(BITFLIP_JUMP)
    result[picked] = torch.where(u < p / 2, torch.where(u < p / 4, x + jump, x - jump), -x)
    return result.view_as(stored.x)


def quant_noise(stored: Stored) -> torch.Tensor:
    """Symmetric uniform n-bit quantise-dequantise, scale per head over what is hit; 1 bit: sign * mean magnitude."""
    x, bits = stored.x, int(stored.parameter)
    magnitude = torch.where(stored.hit, x.abs(), 0.0)
    if bits == 1:
        count = stored.hit.sum((-2, -1), keepdim=True).clamp_(min=1) * x.shape[-1]
        return x.sign() * (magnitude.sum((-2, -1), keepdim=True) / count)
    scale = magnitude.amax((-2, -1), keepdim=True) / (2 ** (bits - 1) - 1)
    scale.clamp_(min=torch.finfo(x.dtype).tiny)  # a head of zeros stays zero
    return (x / scale).round_().mul_(scale)


def contiguous_overwrite(stored: Stored) -> torch.Tensor:
    """Another prompt's cache at the same positions (history swapping, arXiv 2511.12752)."""
    assert stored.donor is not None  # `corrupt` checks the donor before any rule runs
    return stored.donor


@dataclass(frozen=True)
class CorruptionType:
    """A rule and what its parameter is: name, allowed range, and whether only whole numbers make sense.

    A type may need another prompt's cache, and may hit whole pages instead of single positions.
    """

    rule: Callable[[Stored], torch.Tensor]
    parameter: str
    low: float
    high: float
    whole: bool = False
    needs_donor: bool = False
    paged: bool = False

    def check(self, name: str, value: float) -> None:
        """Raise `ValueError` unless `value` is a parameter of this type."""
        if not (self.low <= value <= self.high and math.isfinite(value)) or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            reach = "upwards" if math.isinf(self.high) else f"to {self.high:g}"
            raise ValueError(
                f"parameter {value!r} of {name} is out of range: {self.parameter} is {kind} from {self.low:g} {reach}"
            )


NONE = "none"
TYPES: dict[str, CorruptionType] = {
    "gaussian": CorruptionType(gaussian, "eps, in rms of the vector,", 0.0, math.inf),
    "dropout_zero": CorruptionType(dropout_zero, "the probability p", 0.0, 1.0),
    "orthogonal_rotation": CorruptionType(orthogonal_rotation, "theta", 0.0, 1.0),
    "bitflip_sparse": CorruptionType(bitflip_sparse, "the probability p", 0.0, 1.0),
    "quant_noise": CorruptionType(quant_noise, "the number of bits", 1.0, 16.0, whole=True),
    "contiguous_overwrite": CorruptionType(
        contiguous_overwrite, "the length in positions", 0.0, math.inf, whole=True, needs_donor=True
    ),
}


def check_type(name: str, allowed: tuple[str, ...] = (*TYPES, NONE)) -> None:
    """Raise `ValueError`, with the nearest name, unless `name` is a corruption type."""
    if name not in allowed:
        near = difflib.get_close_matches(str(name), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown corruption type {name!r}{hint}; allowed: {', '.join(allowed)}")


@lru_cache(maxsize=32)
def _spectrum(seed: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R [d, d] with its eigenvectors and eigenvalue angles, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()  # the unique QR with a positive diagonal: Haar-distributed
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    # R is normal and its eigenvalues differ almost surely, so the eigenvectors are unitary up to rounding.
    values, vectors = torch.linalg.eig(q)
    return q, vectors, values.angle()


@lru_cache(maxsize=256)
def rotation(seed: int, dim: int, theta: float) -> torch.Tensor:
    """R^theta, [d, d] float64 with determinant +1: on the shortest path from the identity (0) to R (1).

    R comes from the QR decomposition of a seeded Gaussian matrix; the path multiplies each of its rotation angles by
    theta. The result is cached: do not modify it.
    """
    matrix, vectors, angles = _spectrum(seed, dim)
    if theta == 0.0:
        return torch.eye(dim, dtype=torch.float64)
    if theta == 1.0:
        return matrix
    return ((vectors * torch.polar(torch.ones_like(angles), theta * angles)) @ vectors.mH).real
