"""The quick repair of family E (`rounds` = 0): damaged tokens are written anew from their codes, in matrix products.

The same numbers as `TokenAware.repair`, without what its estimator would have to know of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachemedic.token.layerwise.suspects import Checked


def rewrite(cache: Checked) -> tuple[Tensor, Tensor]:
    """Repairs the cache in place; which tokens were changed, and suspicion, [B, P, T] each."""
    operator, (rows, length) = cache.operator, cache.positions.shape
    strength = operator.strengths(rows) * operator.config.options["correction"]
    suspicion = torch.zeros(rows, len(cache.keys), length, device=cache.positions.device)
    changed = torch.zeros_like(suspicion, dtype=torch.bool)
    for tokens, rotation in cache.chunks():
        valid = cache.positions[:, tokens] >= 0
        for place, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
            seen = cache.look(place, tokens, rotation)
            weight = strength * (((seen.off > cache.tolerance(place)) | seen.wild) & valid)
            suspicion[:, place, tokens] = seen.off * valid
            changed[:, place, tokens] = hit = (weight > 0) | seen.wild  # of padding, too, nothing may stay infinite
            row, at = hit.nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            new, share = _told(cache, place, row, at + tokens.start), weight[row, at, None]
            if (share < 1).any():  # else nothing is left of what was stored
                new = torch.lerp(seen.stored[row, at], new, share)
            parts = new.to(key.dtype).unflatten(-1, (2, key.shape[1], -1)).unbind(1)
            for x, part in zip((key, value), parts, strict=True):
                x[row, :, at + tokens.start] = part
    return changed, suspicion


def _told(cache: Checked, place: int, row: Tensor, at: Tensor) -> Tensor:
    """What ids and codes say of tokens `at` [n] of the rows `row` [n] at one layer, as it is stored: [n, D]."""
    assert cache.operator.code is not None
    if place < cache.known.shape[1]:
        x = cache.known[row, place, at] / cache.transform.scale[place] + cache.transform.mean[place]
    else:
        x = cache.operator.code.restored(place, cache.sketch.inputs[place][row, at], cache.sketch.codes[place][row, at])
    return cache.rotation.at(cache.positions[row, at][None]).redo(x[None])[0]
