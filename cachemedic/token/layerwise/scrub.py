"""A scrub: a whole stored cache is repaired in place, once; decoding after it costs nothing extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.token.layerwise.observation import observe
from cachemedic.token.layerwise.operator import Repair, TokenAware
from cachemedic.token.layerwise.rewrite import rewrite
from cachemedic.token.layerwise.suspects import Checked, pieces, suspects
from cachemedic.token.layerwise.token_prior import lowest_layers
from cachemedic.token.layerwise.token_vectors import KeyRotation, join, split

Codes = list[Tensor] | None


@dataclass(frozen=True, eq=False)
class Found:
    """changed [B, P, T]: which tokens a scrub changed, by protected layer; suspicion [B, P, T]: a score of damage."""

    changed: Tensor
    suspicion: Tensor


class Scrubber(Defense):
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

    @property
    def bytes_per_token(self) -> float:
        return 0.0 if self.operator.code is None else self.operator.code.bits_per_token / 8

    def write(self, clean: CachedTokens) -> Codes:
        """The codes of clean tokens, by protected layer uint8 [B, T, m]; None for an operator without."""
        if self.operator.code is None:
            return None
        positions, ids = clean.positions, clean.ids
        x = self.rotation.at(positions).undo(join(clean.k[:, self.layers], clean.v[:, self.layers]).float())
        z = without_padding(self.transform.standardise(x), positions)
        return self.operator.code.write(z, positions == 0, self.known(ids, positions))

    def read(self, damaged: CachedTokens, kept: Codes) -> CachedTokens:
        """The repaired cache; sound tokens keep every bit."""
        k, v, found = self.scrub(damaged.k, damaged.v, damaged.ids, damaged.positions, kept)
        return replace(damaged, k=k, v=v, suspicion=found.suspicion.mean(1))

    @torch.no_grad()
    def scrub(self, k: Tensor, v: Tensor, ids: Tensor, positions: Tensor, codes: Codes) -> tuple[Tensor, Tensor, Found]:
        """Repaired copies of k, v [B, L, G, T, d], and what was found."""
        mended = k.clone(), v.clone()
        keys, values = ([x[:, layer] for layer in self.layers] for x in mended)
        return *mended, self.mend(keys, values, ids, positions, codes)

    @torch.no_grad()
    def mend(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], ids: Tensor, positions: Tensor, codes: Codes
    ) -> Found:
        """Repairs keys and values [B, G, T, d] of the protected layers in place, and says what was found."""
        known = self.known(ids, positions)
        if codes is not None and self.operator.config.options["rounds"] == 0:
            return Found(*rewrite(self._checked(keys, values, positions, known, codes)))
        found = Found(*(known.new_zeros(len(ids), len(keys), ids.shape[1], dtype=x) for x in (torch.bool, None)))
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        repaired = [
            (tokens, new, repair.suspicion)
            for tokens, new, repair in self._repairs(keys, values, positions, known, codes)
        ]
        for tokens, new, suspicion in repaired:  # only now: a token hears of its neighbours as they were stored
            found.suspicion.scatter_(2, tokens[:, None].expand_as(suspicion), suspicion)
            for layers, parts in zip((keys, values), split(new, keys[0].shape[1]), strict=True):
                for place, x in enumerate(layers):
                    part = parts[:, place].transpose(1, 2).to(x.dtype)
                    found.changed[rows, place, tokens] |= (x[rows, :, tokens] != part).flatten(2).any(-1)
                    x[rows, :, tokens] = part
        return found

    @torch.no_grad()
    def repair(self, k: Tensor, v: Tensor, ids: Tensor, positions: Tensor, codes: Codes) -> Repair:
        """What a scrub of k, v [B, L, G, T, d] adds to them, number by number, as an `AugmentedRead` takes it."""
        known = self.known(ids, positions)
        shape = len(ids), len(self.layers), ids.shape[1]
        found = Repair(*(known.new_zeros(*shape, *n) for n in ((self.transform.width,), (k.shape[2],), ())))
        rows, places = (torch.arange(n, device=ids.device) for n in shape[:2])
        keys, values = ([x[:, layer] for layer in self.layers] for x in (k, v))
        for tokens, _, repair in self._repairs(keys, values, positions, known, codes):
            at = rows[:, None, None], places[:, None], tokens[:, None]
            for whole, part in zip(vars(found).values(), vars(repair).values(), strict=True):
                whole[at] = part
        return found

    def _repairs(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Tensor, known: Tensor, codes: Codes
    ) -> Iterator[tuple[Tensor, Tensor, Repair]]:
        """Tokens [B, n] that may be damaged, some at a time: repaired [B, P, n, D] as stored, and their repair."""
        operator = self.operator
        if codes is None:  # of family D, whose tokens hang on all those before them
            everything = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
            sketch, parts = None, iter([(everything, everything < 0, slice(None))])
        else:
            checked = self._checked(keys, values, positions, known, codes)
            # at least the token before, from which heads of lower layers copy
            sketch, parts = checked.sketch, pieces(suspects(checked), max(1, operator.config.options["window"]))
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        for tokens, fill, own in parts:
            key, value = (
                torch.stack([x[rows, :, tokens] for x in layers], 1).transpose(2, 3) for layers in (keys, values)
            )
            places = positions.take_along_dim(tokens, 1).masked_fill(fill, -1)
            seen = observe(self.transform, key, value, places, self.rotation.at(places))
            of_tokens = known.take_along_dim(tokens[:, None, :, None], 2)
            repair = operator.repair(seen, of_tokens, None if sketch is None else sketch.at(tokens))
            new = seen.stored + repair.correction
            yield tokens[:, own], new[:, :, own], Repair(*(x[:, :, own] for x in vars(repair).values()))

    def _checked(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Tensor, known: Tensor, codes: list[Tensor]
    ) -> Checked:
        assert self.operator.code is not None  # it wrote the codes
        sketch = self.operator.code.understand(codes, positions == 0, known)
        return Checked(self.operator, keys, values, positions, self.rotation, known, sketch)

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
