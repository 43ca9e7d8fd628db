"""The corruption types: one rule each, from stored tensors to damaged ones, and the range of its parameter.

The types of this module are the threat model of the public CacheMedic++ protocol (Uyar 2026, doi
10.5281/zenodo.18669268). Any module, a notebook among them, can add its own with `register_corruption`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

from cachemedic.core.errors import nearest_valid
from cachemedic.core.quantise import UniformLevels
from cachemedic.core.registry import Registry

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


Rule = Callable[[Stored], torch.Tensor]


@dataclass(frozen=True)
class CorruptionType:
    """A rule, and what its parameter is: name, allowed range, and whether only whole numbers make sense.

    `calibration`: increasingly harmful parameters at which its damage is measured; a type without them has no severity.
    `by_share`: severities between two of these are reached by hitting a share of the positions. `is_length`: the
    parameter is the length of a run of positions that is hit. A type may need another prompt's cache, and may hit whole
    pages instead of single positions.
    """

    rule: Rule
    parameter: str
    low: float = 0.0
    high: float = math.inf
    whole: bool = False
    calibration: Sequence[float] = ()
    by_share: bool = False
    is_length: bool = False
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


NONE = "none"  # the type of a sound cache
CORRUPTIONS: Registry[CorruptionType] = Registry("corruption type")
AnyRule = TypeVar("AnyRule", bound=Callable[..., Any])


def register_corruption(name: str, parameter: str, **properties: Any) -> Callable[[AnyRule], AnyRule]:
    """Makes a corruption known by `name`: decorates its rule, a function of what is `Stored`, or a class without
    arguments whose instances are rules.

        @register_corruption("offset", "the offset in rms of the vector", calibration=[0.1, 0.3, 1.0, 3.0])
        def offset(stored):
            return stored.x + stored.parameter * stored.x.square().mean(-1, keepdim=True).sqrt()

    A rule returns new values of all entries; those that are not hit are put back by the caller. `parameter` says what
    its parameter is, `properties` are the other fields of `CorruptionType`. A cell that is run again replaces its own
    definition. Raises `ValueError` for the name of another one.
    """

    def register(definition: AnyRule) -> AnyRule:
        rule = definition() if isinstance(definition, type) else definition
        CORRUPTIONS.add(name, CorruptionType(rule, parameter, **properties), definition)
        return definition

    return register


def check_type(name: str, allowed: Iterable[str] = ()) -> None:
    """Raise `ValueError`, with the nearest name, unless `name` is a corruption type, one of `allowed` if given."""
    names = tuple(allowed) or (*CORRUPTIONS, NONE)
    if name not in names:
        raise nearest_valid("corruption type", name, names)


@register_corruption(
    "gaussian", "eps, in rms of the vector,", calibration=(0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 8.0)
)
def gaussian(stored: Stored) -> torch.Tensor:
    """x + eps * rms(x) * N(0, 1), rms per (head, position) vector."""
    rms = stored.x.square().mean(-1, keepdim=True).sqrt()
    return stored.draw(torch.randn).mul_(rms * stored.parameter).add_(stored.x)


@register_corruption(
    "dropout_zero", "the probability p", high=1.0, calibration=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
)
def dropout_zero(stored: Stored) -> torch.Tensor:
    """Each element is zero with probability p."""
    kept = stored.draw(torch.rand).ge_(stored.parameter)  # 0 or 1; a product is far faster than a boolean mask
    return kept.mul_(stored.x)


@register_corruption(
    "orthogonal_rotation", "theta", high=1.0, calibration=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
)
def orthogonal_rotation(stored: Stored) -> torch.Tensor:
    """x @ R^theta."""
    return stored.x @ rotation(stored.rotation_seed, stored.x.shape[-1], stored.parameter).to(stored.x)


@register_corruption(
    "bitflip_sparse",
    "the probability p",
    high=1.0,
    calibration=(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6),
)
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


@register_corruption(
    "quant_noise",
    "the number of bits",
    low=1.0,
    high=16.0,
    whole=True,
    by_share=True,
    calibration=(8, 6, 5, 4, 3, 2, 1),
)
def quant_noise(stored: Stored) -> torch.Tensor:
    """Symmetric uniform n-bit quantise-dequantise, scale per head over what is hit; 1 bit: sign * mean magnitude.

    NaN and infinities stay.
    """
    x, bits = stored.x, int(stored.parameter)
    counted = stored.hit & x.isfinite()
    magnitude = torch.where(counted, x.abs(), 0.0)
    if bits == 1:
        count = counted.sum((-2, -1), keepdim=True).clamp_(min=1)
        return torch.where(counted, x.sign() * (magnitude.sum((-2, -1), keepdim=True) / count), x)
    largest = 2 ** (bits - 1) - 1
    levels = UniformLevels.symmetric(magnitude.amax((-2, -1), keepdim=True), largest)
    return torch.where(counted, levels.read(levels.codes(x, -largest, largest)), x)


@register_corruption(
    "contiguous_overwrite",
    "the length in positions",
    whole=True,
    is_length=True,
    needs_donor=True,
    calibration=(4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128),
)
def contiguous_overwrite(stored: Stored) -> torch.Tensor:
    """Another prompt's cache at the same positions (history swapping, arXiv 2511.12752)."""
    assert stored.donor is not None  # `corrupt` checks the donor before any rule runs
    return stored.donor


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
