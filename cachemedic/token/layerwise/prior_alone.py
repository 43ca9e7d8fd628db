"""The defense that D and E are compared with: it looks at token ids only."""

from __future__ import annotations

from dataclasses import replace

import torch

from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.token.layerwise.observation import known_tolerance, sane
from cachemedic.token.layerwise.scrub import Scrubber
from cachemedic.token.layerwise.token_vectors import join, split


class PriorAlone(Defense):
    """Replaces a token whose lowest layers are not those that its id tells by what the ids predict, in all layers.

    So it does with a token that holds, anywhere, a number that no clean one has. Nothing is stored and no damaged
    number is believed. Raises `ValueError` for an operator without a prior.
    """

    def __init__(self, scrubber: Scrubber) -> None:
        if scrubber.operator.known_layers == 0:
            raise ValueError("the prior starts from layers that the token ids tell; this operator has known_layers = 0")
        self.scrubber = scrubber

    def read(self, damaged: CachedTokens, kept: None) -> CachedTokens:
        transform, layers = self.scrubber.transform, self.scrubber.layers
        k, v, ids, positions = damaged.k, damaged.v, damaged.ids, damaged.positions
        rotation = self.scrubber.rotation.at(positions)
        known = self.scrubber.known(ids, positions)
        chain = [known[:, layer] for layer in range(known.shape[1])]
        while len(chain) < len(layers):
            chain.append(transform.predict(len(chain), chain[-1], positions == 0))
        predicted = split(rotation.redo(transform.restore(torch.stack(chain, 1))), k.shape[2])
        lowest = layers[: known.shape[1]]
        stored = join(k[:, layers], v[:, layers]).float()
        plausible = (stored.abs() < sane(transform)[:, None]).all(-1).all(1)
        read = rotation.undo(stored[:, : len(lowest)])
        off = (read - transform.mean[: len(lowest), None]) * transform.scale[: len(lowest), None] - known
        as_expected = (off.abs() <= known_tolerance(k)).all(-1).all(1)  # false for NaN
        sound = plausible & (as_expected | ~damaged.valid)  # of padding the ids tell nothing
        result = [k.clone(), v.clone()]
        for x, new in zip(result, predicted, strict=True):
            x[:, layers] = torch.where(sound[:, None, None, :, None], x[:, layers], new.to(x.dtype))
        return replace(damaged, k=result[0], v=result[1])
