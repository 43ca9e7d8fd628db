"""Which tokens of a stored cache a scrub of family E has to look at: a quick check against the sketch.

Sound tokens pay one projection a layer, so that a scrub costs what is damaged and not what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cachemedic.token_aware.observation import sane
from cachemedic.token_aware.operator import DEAD_ZONE, KNOWN_TOLERANCE, TokenAware
from cachemedic.token_aware.sketch_code import Sketch
from cachemedic.token_aware.token_vectors import Rotation, join

CAUTION = 0.5  # of the tolerances: rounding here must hide no token that the operator would repair
PIECE = 256  # tokens that are repaired at once: their numbers stay in the processor's cache


def suspects(
    operator: TokenAware, k: Tensor, v: Tensor, positions: Tensor, rotation: Rotation, known: Tensor, sketch: Sketch
) -> Tensor:
    """Tokens [B, T] of the stored k, v [B, L, G, T, d] that the operator might change."""
    transform, code = operator.transform, operator.code
    assert transform is not None  # it has a sketch
    assert code is not None
    wild = off = torch.zeros_like(positions, dtype=torch.bool)
    for place, layer in enumerate(operator.layers):
        stored = join(k[:, layer : layer + 1], v[:, layer : layer + 1])[:, 0].float()
        size = stored.abs()
        wild = wild | ~((size.amin(-1) > 0) & (size.amax(-1) < sane(transform)[place].min()))
        x = rotation.undo(stored)
        if place < known.shape[1]:
            z = (x - transform.mean[place]) * transform.scale[place]
            off = off | ((z - known[:, place]).abs().amax(-1) > CAUTION * KNOWN_TOLERANCE)
        else:
            off = off | (code.residual_of(place, x, sketch) > CAUTION * DEAD_ZONE)
    return wild | (off & (positions >= 0))


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
