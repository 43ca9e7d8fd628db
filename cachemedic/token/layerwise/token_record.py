"""What a cache remembers of its tokens where the faults do not reach, and how it is written, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachemedic.token.layerwise.scrub import Codes, Scrubber, without_padding
from cachemedic.token.layerwise.token_vectors import join
from cachemedic.token.scalar_codes import pack, unpack


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """Of T cached tokens in B rows: ids [B, T]; positions [B, T], -1 for padding; sketch [B, T, bytes], packed codes of
    all layers, of no bytes for family D; last [P, B, 1, 2 q]: what each layer of the newest token says of the next
    layer, from which the next token is predicted (None: to be read from the sketch again).
    """

    ids: Tensor
    positions: Tensor
    sketch: Tensor
    last: Tensor | None

    def __len__(self) -> int:
        return self.ids.shape[1]

    def rows(self, choose: Callable[[Tensor], Tensor]) -> TokenRecord:
        """The same of other rows; `choose` picks them along the first axis of a tensor."""
        last = None if self.last is None else choose(self.last.transpose(0, 1)).transpose(0, 1)
        return TokenRecord(choose(self.ids), choose(self.positions), choose(self.sketch), last)

    def up_to(self, length: int) -> TokenRecord:
        """The first `length` tokens."""
        if length == len(self):
            return self
        return TokenRecord(self.ids[:, :length], self.positions[:, :length], self.sketch[:, :length], None)

    def codes(self, scrubber: Scrubber, tokens: slice = slice(None)) -> Codes:
        """The sketch of some `tokens` as codes by layer, uint8 [B, T, m]; None for family D."""
        code = scrubber.operator.code
        if code is None:
            return None
        return list(unpack(self.sketch[:, tokens], code.bits.flatten()).chunk(len(code.bits), -1))

    def with_last(self, scrubber: Scrubber) -> TokenRecord:
        """The same with `last`, read from the sketch where it is not known."""
        code = scrubber.operator.code
        if code is None or self.last is not None:
            return self
        newest = slice(-len(code.bits), None)  # a layer looks one token back: as many tokens as layers tell the last
        recent = self.codes(scrubber, newest)
        assert recent is not None  # there is a code
        known = scrubber.known(self.ids, self.positions)
        sketch = code.understand(recent, self.positions[:, newest] == 0, known[:, :, newest])
        return replace(self, last=torch.stack([said[:, -1:] for said in sketch.said]))


class RecordWriter:
    """Writes the record of the new tokens ids [B, M] at `positions` [B, M] of one forward pass, behind `before`."""

    def __init__(self, scrubber: Scrubber, before: TokenRecord | None, ids: Tensor, positions: Tensor) -> None:
        self.scrubber, self.ids, self.positions = scrubber, ids, positions
        self.before = None if before is None else before.with_last(scrubber)
        self.rotation = scrubber.rotation.at(positions)
        self.layer = 0  # of the model, the next one to be written
        self._below: Tensor | None = None  # what the last layer says, of the token before the new ones too
        self._codes: list[Tensor] = []
        self._last: list[Tensor] = []

    @torch.no_grad()
    def write(self, key: Tensor, value: Tensor) -> None:
        """Codes the keys and values [B, G, M, d] of the next layer as they are stored."""
        layer, self.layer = self.layer, self.layer + 1
        code = self.scrubber.operator.code
        if code is None or layer not in self.scrubber.layers:
            return
        index = self.scrubber.layers.index(layer)
        transform = self.scrubber.transform
        x = self.rotation.undo(join(key[:, None], value[:, None]).float())[:, 0]
        z = without_padding((x - transform.mean[index]) * transform.scale[index], self.positions)
        _, codes, said = code.code_layer(index, z, self._below, self.positions == 0)
        if index < self.scrubber.operator.known_layers:
            said = code.tell(index, z)
        self._codes.append(codes)
        self._last.append(said[:, -1:])
        earlier = None if self.before is None else self.before.last
        self._below = said if earlier is None else torch.cat([earlier[index], said], 1)

    def finish(self) -> TokenRecord:
        """The record of all tokens, once every layer is written."""
        code = self.scrubber.operator.code
        if code is None:
            sketch, last = self.ids.new_zeros(*self.ids.shape, 0, dtype=torch.uint8), None
        else:
            sketch, last = pack(torch.cat(self._codes, -1), code.bits.flatten()), torch.stack(self._last)
        if self.before is None:
            return TokenRecord(self.ids, self.positions, sketch, last)
        return TokenRecord(
            torch.cat([self.before.ids, self.ids], 1),
            torch.cat([self.before.positions, self.positions], 1),
            torch.cat([self.before.sketch, sketch], 1),
            last,
        )
