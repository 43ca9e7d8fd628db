"""A scrub: a whole stored cache is repaired in place, once; decoding after it costs nothing extra."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.defenses import Defended
from cachemedic.safeguards import Safeguard
from cachemedic.token_aware.observation import observe
from cachemedic.token_aware.operator import Repair, TokenAware
from cachemedic.token_aware.suspects import pieces, suspects
from cachemedic.token_aware.token_prior import lowest_layers
from cachemedic.token_aware.token_vectors import KeyRotation, join, split

Codes = list[Tensor] | None


class Scrubber(Safeguard):
    """A calibrated operator of family D or E at work on the caches of one model.

    Raises `ValueError` for an operator that was not calibrated or is made for another model.
    """

    def __init__(self, model: PreTrainedModel, operator: TokenAware) -> None:
        operator.check_model(model.config)
        if operator.transform is None:
            raise ValueError("this operator knows no clean tokens yet: give it to `calibrate` with a base first")
        self.model, self.operator, self.transform = model, operator, operator.transform
        self.rotation = KeyRotation(model)
        self.layers = list(operator.layers)

    @property
    def runs(self) -> int:
        """Of the operator; batch rows are run-major."""
        return self.operator.runs

    def bits_per_token(self) -> float:
        return 0 if self.operator.code is None else self.operator.code.bits_per_token

    def write(self, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor) -> Codes:
        """The codes of clean k, v [B, L, G, T, d], by protected layer uint8 [B, T, m]; None for an operator without."""
        if self.operator.code is None:
            return None
        positions = positions_of(valid)
        x = self.rotation.at(positions).undo(join(k[:, self.layers], v[:, self.layers]).float())
        z = without_padding(self.transform.standardise(x), positions)
        return self.operator.code.write(z, positions == 0, self.known(ids, positions))

    def read(self, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor, kept: Codes) -> Defended:
        """The repaired cache; sound tokens keep every bit."""
        return Defended(*self.scrub(k, v, ids, positions_of(valid), kept)[:2])

    @torch.no_grad()
    def scrub(
        self, k: Tensor, v: Tensor, ids: Tensor, positions: Tensor, codes: Codes
    ) -> tuple[Tensor, Tensor, Repair]:
        """Repaired copies of k, v [B, L, G, T, d], and what was found."""
        operator, known = self.operator, self.known(ids, positions)
        mended = k.clone(), v.clone()
        shape = len(ids), len(self.layers), ids.shape[1]
        found = Repair(*(known.new_zeros(*shape, *n) for n in ((self.transform.width,), (k.shape[2],), ())))
        rows = torch.arange(len(ids), device=ids.device)[:, None, None]
        layers = torch.tensor(self.layers, device=ids.device)[:, None]
        everything = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if codes is None or operator.code is None:  # of family D, whose tokens hang on all those before them
            sketch, parts = None, iter([(everything, everything < 0, slice(None))])
        else:
            sketch = operator.code.understand(codes, positions == 0, known)
            rotation = self.rotation.at(positions)
            to_repair = suspects(operator, k, v, positions, rotation, known, sketch)
            # at least the token before, from which heads of lower layers copy
            parts = pieces(to_repair, max(1, operator.config.options["window"]))
        for tokens, fill, own in parts:
            at = rows, layers, slice(None), tokens[:, None]
            key, value = (x[at].transpose(2, 3) for x in (k, v))
            places = positions.take_along_dim(tokens, 1).masked_fill(fill, -1)
            seen = observe(self.transform, key, value, places, self.rotation.at(places))
            of_tokens = known.take_along_dim(tokens[:, None, :, None], 2)
            repair = operator.repair(seen, of_tokens, None if sketch is None else sketch.at(tokens))
            at = rows, layers, slice(None), tokens[:, None, own]
            for result, new in zip(mended, split(seen.stored + repair.correction, k.shape[2]), strict=True):
                result[at] = new.transpose(2, 3)[:, :, own].to(result.dtype)
            place = rows, torch.arange(len(layers), device=ids.device)[:, None], tokens[:, None, own]
            for result, new in zip(vars(found).values(), vars(repair).values(), strict=True):
                result[place] = new[:, :, own]
        return *mended, found

    def known(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The lowest layers as the ids tell them, [B, j, T, D] unrotated and in units of the scale; 0 for padding."""
        count = self.operator.known_layers
        if count == 0:
            return torch.zeros(*ids.shape[:1], 0, *ids.shape[1:], self.transform.width, device=ids.device)
        k, v = lowest_layers(self.model, ids, positions, max(self.layers[:count]) + 1)
        lowest = self.layers[:count]
        x = self.rotation.at(positions).undo(join(k[:, lowest], v[:, lowest]).float())
        z = (x - self.transform.mean[:count, None]) * self.transform.scale[:count, None]
        return without_padding(z, positions)


def positions_of(valid: Tensor) -> Tensor:
    """Positions [B, T] of tokens behind left padding, -1 for the padding, from which positions are `valid` [B, T]."""
    return torch.where(valid, valid.long().cumsum(1) - 1, -1)


def without_padding(z: Tensor, positions: Tensor) -> Tensor:
    """z [..., T, D] with zeros for padding: what is written must not depend on what no later read knows."""
    absent = positions < 0
    return z.masked_fill((absent if z.dim() == 3 else absent[:, None])[..., None], 0)
