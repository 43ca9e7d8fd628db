"""Between the stored numbers of a cache and what the joint model of an operator says of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachemedic.token.joint import RECENT, Prior
from cachemedic.token.lowest_layer import lowest_layer
from cachemedic.token.record import TokenRecord
from cachemedic.token.vectors import TokenVectors

CODED = 512  # tokens a row whose vectors are held at once


class Coder:
    """Writes the codes of tokens and tells their numbers again, for the caches of one model.

    operator: of family E with a joint model and a code, or D with a joint model only. Raises `ValueError` for an
    operator that was not calibrated or is made for another model.
    """

    def __init__(self, model: PreTrainedModel, operator: Any) -> None:
        operator.check_model(model.config)
        if operator.joint is None:
            raise ValueError("this operator knows no clean tokens yet: give it to `calibrate` with a base first")
        self.model, self.operator = model, operator
        self.joint, self.code = operator.joint, operator.code
        self.vectors = TokenVectors(model, self.joint.layers)
        self.lowest = TokenVectors(model, [0])

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that it tells of."""
        return self.vectors.layers

    @property
    def bytes_per_token(self) -> int:
        """Of a code; 0 without."""
        return 0 if self.code is None else self.code.bytes_per_token

    @property
    def fixed_bytes(self) -> int:
        """What the joint model takes in memory."""
        return self.joint.fixed_bytes

    def encode(self, keys: list[Tensor], values: list[Tensor], positions: Tensor, tokens: slice) -> Tensor:
        """The codes uint8 [B, n, bytes] of n `tokens` of clean keys and values [B, G, T, d] of all layers."""
        assert self.code is not None  # it has bytes a token
        starts = range(tokens.start, tokens.stop, CODED)
        parts = [slice(start, min(start + CODED, tokens.stop)) for start in starts]
        return torch.cat([self._encode(keys, values, positions, part) for part in parts], 1)

    def _encode(self, keys: list[Tensor], values: list[Tensor], positions: Tensor, tokens: slice) -> Tensor:
        assert self.code is not None
        x = self.vectors.of(
            [keys[layer][:, :, tokens] for layer in self.layers],
            [values[layer][:, :, tokens] for layer in self.layers],
            positions[:, tokens],
        )
        if not self.code.with_ids:
            return self.code.encode(x)
        start = max(0, tokens.start - (RECENT - 1))
        near = slice(start, tokens.stop)
        lowest = self.lowest.of([keys[0][:, :, near]], [values[0][:, :, near]], positions[:, near])
        prior = self.joint.prior_of(lowest, len(self.code.bits)).tokens(slice(tokens.start - start, None))
        return self.code.encode(x, prior)

    def restore(self, record: TokenRecord, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, L', G, d] as stored of the tokens (rows[i], slots[i]), from code and ids alone."""
        positions = record.positions[rows, slots][None]
        prior, c = self._told(record, rows, slots)
        return self._stored(self.joint.reconstruct(c, prior), positions)

    def estimate(
        self, record: TokenRecord, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same from what is left of the tokens, keys and values [N, L', G, d], as well."""
        positions = record.positions[rows, slots][None]
        read_keys, read_values = (side.permute(1, 2, 0, 3)[None] for side in (keys, values))
        x = self.vectors.of(read_keys, read_values, positions)
        prior, c = self._told(record, rows, slots)
        return self._stored(self.operator.estimate(x, c, prior, positions), positions)

    def _told(self, record: TokenRecord, rows: Tensor, slots: Tensor) -> tuple[Prior, Tensor]:
        """What ids and codes tell of N tokens: their prior, and coordinates [1, N, n]."""
        first, end = max(0, int(slots.min()) - (RECENT - 1)), int(slots.max()) + 1
        lowest = lowest_layer(self.model, record.ids[:, first:end], record.positions[:, first:end])
        near = self.joint.recent(lowest)[rows, slots - first][None]
        count = None if self.code is None else len(self.code.bits)
        prior = Prior(self.joint.prior_mean(near, count), lowest[rows, slots - first][None])
        coded = slots < record.codes.shape[1]
        if self.code is None or not coded.any():
            return prior, prior.mean
        of_coded = prior.tokens(coded) if self.code.with_ids else None
        c = prior.mean.clone()
        packed = record.codes[rows[coded], slots[coded]][None]
        c[:, coded] = self.code.decode(packed, of_coded, dtype=c.dtype)
        return prior, c

    def _stored(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.vectors.back(x, positions)
        return keys[0].permute(2, 0, 1, 3), values[0].permute(2, 0, 1, 3)
