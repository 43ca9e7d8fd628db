"""The parts of a token, and how far their numbers may lie from a prediction.

A part is the keys or the values of one head in one layer: d numbers that a fault usually hits alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachemedic.token.joint import JointModel
from cachemedic.token.scratch import Scratch
from cachemedic.token.vectors import Angles, turn_

LEAST = 1e-6  # of a variance, over the largest


@dataclass(frozen=True)
class Parts:
    """The layout of a vector [D]: [L, 2, G] parts of d numbers each, P = 2 L G of them, keys before values."""

    layers: int
    heads: int
    width: int

    @classmethod
    def of_model(cls, joint: JointModel) -> Parts:
        """Those of the tokens of a joint model."""
        return cls(len(joint.layers), joint.of.num_kv_heads, joint.of.head_dim)

    @property
    def count(self) -> int:
        """P."""
        return 2 * self.layers * self.heads

    def split(self, x: Tensor) -> Tensor:
        """x [..., D] as [..., P, d]."""
        return x.unflatten(-1, (self.count, self.width))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.layers, 2, self.heads, self.width))

    def stack(self, keys: Tensor, values: Tensor) -> Tensor:
        """Vectors [B, T, D] of keys and values [B, L, G, T, d], both as they are."""
        return torch.stack([keys, values], 2).permute(0, 4, 1, 2, 3, 5).flatten(2)

    def unstack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `stack`."""
        keys, values = self._by_head(x).permute(3, 0, 2, 4, 1, 5)
        return keys, values

    def rotate_(self, x: Tensor, angles: Angles | None, direction: int, scratch: Scratch | None = None) -> Tensor:
        """Vectors x [B, T, D] with their keys rotated (direction 1) or unrotated (-1), in place."""
        turn_(self._by_head(x)[:, :, :, 0], angles, direction, scratch)
        return x

    def level(self, variance: Tensor) -> Tensor:
        """Variances [..., D] of unrotated numbers as those of rotated ones at any angle: the mean of each pair."""
        keys, values = self._by_head(variance).unbind(-3)
        pairs = keys.unflatten(-1, (2, -1)) if self.width % 2 == 0 else keys[..., None, :]
        keys = pairs.mean(-2, keepdim=True).expand_as(pairs).flatten(-2)
        return torch.stack([keys, values], -3).flatten(-4)


@dataclass(frozen=True, eq=False)
class DeviationModel:
    """How far c and the numbers of a token may deviate from their prediction, for predictions of K kinds.

    parts: the layout of a vector; scale [D]: of the joint model; axes [n, D]: those that an estimate moves along;
    left [K, n]: the variance of c; spread [K, D]: of each number; exact [K, P]: parts that are predicted exactly;
    rest [K, D]: the variance of each number once these n are known; mass [n, P]: the share of each part in the length
    of an axis; power: the mean variance of a clean number.
    """

    parts: Parts
    axes: Tensor
    scale: Tensor
    left: Tensor
    spread: Tensor
    exact: Tensor
    rest: Tensor
    mass: Tensor
    power: float

    @classmethod
    def of(cls, joint: JointModel, left: Tensor, exact: Tensor, count: int) -> DeviationModel:
        """left [K, m]: the variance of c; exact [K]: whether the lowest layer is predicted exactly; count: n."""
        parts = Parts.of_model(joint)
        squares = joint.axes.float().square()
        least = LEAST * float(joint.variance.max())
        lowest = torch.arange(parts.count, device=left.device) < 2 * parts.heads
        rest = joint.rest + left[:, count:] @ squares[count:]
        return cls(
            parts=parts,
            axes=joint.axes[:count],
            scale=joint.scale.float(),
            left=left[:, :count].clamp_min(least),
            spread=parts.level(joint.rest + left @ squares).clamp_min(least),
            exact=exact[:, None] & lowest & joint.lowest_is_exact,
            rest=parts.level(rest).clamp_min(least),
            mass=parts.split(squares[:count]).sum(-1),
            power=float((joint.rest.sum() + joint.variance.sum() + joint.prior_variance.sum()) / joint.dim),
        )
