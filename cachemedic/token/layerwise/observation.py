"""What families D and E see of a stored cache before they judge it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachemedic.token.layerwise.token_vectors import Rotation, join
from cachemedic.token.layerwise.transform import Transform

LIMIT = 40.0  # units of the scale: no clean number lies so far from the mean
KNOWN_TOLERANCE = 1e-2  # units of the scale: the same for layers that are recomputed from the token ids
ULPS = 8  # the same in formats of lower precision, in units of their rounding
SMALL = 1e-6
GRAIN_RANGE = (-7.0, 3.0)


def sane(transform: Transform) -> Tensor:
    """Magnitudes [P, D] from which on a stored number is no clean one: it is read as zero, like those not finite.

    A stored key is rotated: two numbers of its mean may have come together in one.
    """
    mean = 2**0.5 * (transform.mean * transform.scale).abs().amax(-1, keepdim=True)
    return (LIMIT + mean + transform.first.abs().amax(-1, keepdim=True)) / transform.scale


def known_tolerance(stored: Tensor) -> float:
    """How far, in units of the scale, sound numbers of this dtype may lie from what the token ids say of them."""
    return max(KNOWN_TOLERANCE, ULPS * torch.finfo(stored.dtype).eps)


@dataclass(frozen=True, eq=False)
class Observation:
    """A stored cache of N rows, P layers, T tokens, keys rotated as stored.

    stored [N, P, T, D]: keys and values joined, zero where they are not finite or out of all bounds; z [N, P, T, D]:
    the same in units of `Transform.scale`; lost [N, P, T, D]: elements that are exactly zero, or were put to zero;
    grain [N, P, T, H']: log of the smallest kept magnitude of a head over the mean one, large for coarse quantisation;
    implausible [N, P, T]: whether an element of the token was put to zero; positions [N, T], -1 for padding;
    rotation of its keys; tolerance: see `known_tolerance`.
    """

    stored: Tensor
    z: Tensor
    lost: Tensor
    grain: Tensor
    implausible: Tensor
    positions: Tensor
    rotation: Rotation
    tolerance: float

    @property
    def is_first(self) -> Tensor:
        return self.positions == 0


def observe(transform: Transform, key: Tensor, value: Tensor, positions: Tensor, rotation: Rotation) -> Observation:
    """The observation of stored keys and values [N, P, G, T, d]."""
    read = join(key, value).float()
    plausible = read.abs() < sane(transform)[:, None]
    stored = torch.where(plausible, read, 0.0)
    lost = stored == 0
    heads = 2 * key.shape[2]
    kept = (~lost).unflatten(-1, (heads, -1))
    size = stored.abs().unflatten(-1, (heads, -1))
    mean = size.sum(-1) / kept.sum(-1).clamp_min(1)
    least = torch.where(kept, size, torch.inf).amin(-1)
    grain = (least.clamp_max(1 / SMALL) / (mean + SMALL) + 1e-3).log().clamp(*GRAIN_RANGE)
    z = rotation.redo(transform.standardise(rotation.undo(stored)))
    return Observation(stored, z, lost, grain, ~plausible.all(-1), positions, rotation, known_tolerance(key))
