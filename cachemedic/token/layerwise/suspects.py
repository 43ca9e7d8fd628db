"""Which tokens of a stored cache a scrub of family E has to look at: a quick check against the sketch.

Sound tokens pay one projection a layer, so that a scrub costs what is damaged and not what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cachemedic.token.layerwise.observation import known_tolerance, sane
from cachemedic.token.layerwise.operator import DEAD_ZONE, TokenAware
from cachemedic.token.layerwise.sketch_code import Sketch
from cachemedic.token.layerwise.token_vectors import KeyRotation, Rotation, join
from cachemedic.token.layerwise.transform import Transform

CAUTION = 0.5  # of the tolerances: rounding here must hide no token that the operator would repair
CHUNK = 256  # tokens that are checked at once: their numbers stay in the processor's cache
PIECE = 256  # tokens that are repaired at once, likewise


@dataclass(frozen=True, eq=False)
class Look:
    """Some tokens at one layer. stored [B, n, D]: as they are read, zero where no clean number can be; wild [B, n]:
    whether there is such a number; off [B, n]: how far they are from what the ids or the codes say.
    """

    stored: Tensor
    wild: Tensor
    off: Tensor


@dataclass(frozen=True, eq=False)
class Checked:
    """A stored cache beside its sketch: keys, values [B, G, T, d] by protected layer; positions [B, T], -1 for padding;
    known [B, j, T, D]: the lowest layers as the token ids say, in units of the scale.
    """

    operator: TokenAware
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    positions: Tensor
    rotation: KeyRotation
    known: Tensor
    sketch: Sketch

    @cached_property
    def limits(self) -> list[tuple[Tensor, float]]:
        """By layer: magnitudes [D] from which on a number is no clean one, and the least of them."""
        limits = sane(self.transform)
        return list(zip(limits, limits.amin(-1).tolist(), strict=True))

    @property
    def transform(self) -> Transform:
        assert self.operator.transform is not None  # it has a sketch
        return self.operator.transform

    def chunks(self) -> Iterator[tuple[slice, Rotation]]:
        """All tokens, some at a time, and the rotation of their keys."""
        rows, length = self.positions.shape
        size = max(1, CHUNK // rows)
        for start in range(0, length, size):
            tokens = slice(start, min(length, start + size))
            yield tokens, self.rotation.at(self.positions[:, tokens])

    def tolerance(self, place: int) -> float:
        """How far off a sound token may be at protected layer number `place`."""
        return known_tolerance(self.keys[place]) if place < self.known.shape[1] else DEAD_ZONE

    def look(self, place: int, tokens: slice, rotation: Rotation) -> Look:
        """The tokens at protected layer number `place`."""
        assert self.operator.code is not None
        key, value = (x[place][:, None, :, tokens] for x in (self.keys, self.values))
        stored = join(key, value)[:, 0].float()
        limits, least = self.limits[place]
        wild = ~((stored.amax(-1) < least) & (stored.amin(-1) > -least))  # NaN is wild
        if wild.any():
            plausible = stored.abs() < limits
            stored, wild = torch.where(plausible, stored, 0.0), ~plausible.all(-1)
        x = rotation.undo(stored)
        if place < self.known.shape[1]:
            z = (x - self.transform.mean[place]) * self.transform.scale[place]
            return Look(stored, wild, rotation.redo(z - self.known[:, place, tokens]).abs().amax(-1))
        inputs, codes = self.sketch.inputs[place][:, tokens], self.sketch.codes[place][:, tokens]
        return Look(stored, wild, self.operator.code.residual_of(place, x, inputs, codes))


def suspects(cache: Checked) -> Tensor:
    """Tokens [B, T] that the operator might change."""
    found = torch.zeros_like(cache.positions, dtype=torch.bool)
    for tokens, rotation in cache.chunks():
        valid = cache.positions[:, tokens] >= 0
        for place in range(len(cache.keys)):
            seen = cache.look(place, tokens, rotation)
            found[:, tokens] |= seen.wild | ((seen.off > CAUTION * cache.tolerance(place)) & valid)
    return found


def pieces(found: Tensor, window: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """The tokens that were `found` [B, T] with `window` neighbours on each side, `PIECE` at a time.

    Each piece: tokens [B, n] in their order, which of them are there for the batch's sake only [B, n], and the slice of
    the n that is its own; the others are neighbours that the next piece or the one before holds.
    """
    near = F.max_pool1d(found.float(), 2 * window + 1, 1, window) > 0
    count = int(near.sum(1).max())
    order = near.logical_not().byte().argsort(dim=1, stable=True)[:, :count]
    for start in range(0, count, PIECE):
        low, end = max(0, start - window), min(count, start + PIECE)
        tokens = order[:, low : min(count, end + window)]
        yield tokens, ~near.take_along_dim(tokens, 1), slice(start - low, end - low)
