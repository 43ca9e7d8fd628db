"""The code of family E: a few bits for each coordinate of a token's innovations, layer by layer in a closed loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cachemedic.token_aware.scalar_codes import SCALE_LIMIT, allot_bits, cell, decode, distortion, encode
from cachemedic.token_aware.transform import Transform


@dataclass(frozen=True, eq=False)
class SketchCode:
    """How innovations are stored: bits [P, m] a coordinate, and spread [P, m], their standard deviations."""

    transform: Transform
    bits: Tensor
    spread: Tensor

    @classmethod
    def fit(
        cls, transform: Transform, z: Tensor, is_first: Tensor, known: int, budget: int, coordinates: int
    ) -> SketchCode:
        """Spend `budget` bits a token where they lower the error most, measured on clean vectors z [N, P, T, D].

        The lowest `known` layers follow from the token ids and get none. The innovation is that from the decoded layer
        below, whose own error depends on the bits: a few rounds settle it.
        """
        variance = transform.variance[:, :coordinates].clone()
        variance[:known] = 0
        for _ in range(3):
            code = cls(transform, allot_bits(variance, budget), variance.sqrt().clamp_min(SCALE_LIMIT))
            for layer, (_, innovation, _, _) in enumerate(code.follow(z, is_first, z[:, :known])):
                if layer >= known:
                    variance[layer] = innovation[~is_first].square().mean(0)
        return cls(transform, code.bits, variance.sqrt().clamp_min(SCALE_LIMIT))

    @property
    def bits_per_token(self) -> int:
        """Of one token, over all layers."""
        return int(self.bits.sum())

    def write(self, z: Tensor, is_first: Tensor, known: Tensor) -> list[Tensor]:
        """Codes of clean vectors z [B, P, T, D] by layer, uint8 [B, T, m]; known [B, j, T, D] are the lowest layers."""
        return [codes for _, _, codes, _ in self.follow(z, is_first, known)]

    def follow(self, z: Tensor, is_first: Tensor, known: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Codes z layer by layer: (prediction, innovation [B, T, m], codes, reconstruction [B, T, D]) of each."""
        below = None
        for layer in range(self.transform.num_layers):
            predicted, innovation, codes, decoded = self.code_layer(layer, z[:, layer], below, is_first)
            below = known[:, layer] if layer < known.shape[1] else decoded
            yield predicted, innovation, codes, below

    def code_layer(
        self, layer: int, z: Tensor, below: Tensor | None, is_first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step of `follow`: z [B, T, D] of one layer, from the reconstruction `below` of the layer before."""
        predicted = self.transform.predict(layer, below, is_first)
        innovation = (z - predicted) @ self._basis(layer)
        codes = encode(innovation / self.spread[layer], self.bits[layer])
        return predicted, innovation, codes, self._decode(layer, predicted, codes)

    def read(self, codes: list[Tensor], is_first: Tensor, known: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What stored codes say, layer by layer: (prediction, reconstruction), [B, T, D] each."""
        below = None
        for layer in range(self.transform.num_layers):
            predicted = self.transform.predict(layer, below, is_first)
            below = known[:, layer] if layer < known.shape[1] else self._decode(layer, predicted, codes[layer])
            yield predicted, below

    def uncertainty(self, layer: int) -> Tensor:
        """Variance [m] that the code leaves of each coordinate."""
        left = torch.tensor([distortion(bits) for bits in self.bits[layer].tolist()])
        return self.spread[layer].square() * left.to(self.spread)

    def _basis(self, layer: int) -> Tensor:
        return self.transform.basis[layer][:, : self.bits.shape[1]]

    def _decode(self, layer: int, predicted: Tensor, codes: Tensor) -> Tensor:
        innovation = decode(codes, self.bits[layer]) * self.spread[layer]
        return predicted + innovation @ self._basis(layer).mT

    def residual(self, layer: int, innovation: Tensor, codes: Tensor) -> Tensor:
        """How far an innovation [B, T, m] lies outside of the stored cells, in standard deviations; 0 inside."""
        low, high = cell(codes, self.bits[layer])
        y = innovation / self.spread[layer]
        return (y - high).clamp_min(0) + (y - low).clamp_max(0)
