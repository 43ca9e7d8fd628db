"""The code of family E: a few bits for each coordinate of a token's innovations, layer by layer in a closed loop.

A layer is predicted from what the codes say of the layer below. That lies in few dimensions: the q inputs of the chain,
whether the token is the first, and the m coded coordinates; so the loop runs in these, and full vectors are formed only
where they are asked for. What is passed from a layer to the next are the inputs of its chain: 2 q numbers a token, q
for the token itself and q for the one after it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from cachemedic.token.layerwise.transform import Transform
from cachemedic.token.scalar_codes import SCALE_LIMIT, allot_bits, cell, decode, distortion, encode

ROUNDING = 4e-4  # standard deviations: less than this is no innovation, and well within the dead zone of a check


@dataclass(frozen=True, eq=False)
class Sketch:
    """Stored codes by layer, uint8 [B, T, m], and what they say: inputs [B, T, q + 1] of the layer's own prediction,
    the last of them for the first token; said [B, T, 2 q], of the next layer.
    """

    codes: list[Tensor]
    inputs: list[Tensor]
    said: list[Tensor]

    def at(self, tokens: Tensor) -> Sketch:
        """The same of some tokens [B, T'] of each row."""
        parts = ([x.take_along_dim(tokens[..., None], 1) for x in layers] for layers in vars(self).values())
        return Sketch(*parts)


@dataclass(frozen=True, eq=False)
class _Coded:
    """One layer as stored vectors x = z / scale + mean see it, with those m' of its coordinates that have bits.

    which [m'] of the m; spread [m']; x @ axes [D, m'] - inputs @ echo [q + 1, m'] - centre [m']: the innovation in
    standard deviations; [inputs, innovation] @ back [q + 1 + m', D] + mean: x.
    """

    which: Tensor
    spread: Tensor
    axes: Tensor
    echo: Tensor
    centre: Tensor
    back: Tensor


@dataclass(frozen=True, eq=False)
class SketchCode:
    """How innovations are stored: bits [P, m] a coordinate, and spread [P, m], their standard deviations.

    From them and the transform: basis [P, D, m]; outputs [P, q + 1, D]: the prediction from its inputs; chain
    [P, D, 2 q], and inner_chain [P, q + 1 + m, 2 q]: what a layer says of the next one, from the vector or its code.
    """

    transform: Transform
    bits: Tensor
    spread: Tensor
    basis: Tensor = field(init=False)
    outputs: Tensor = field(init=False)
    chain: Tensor = field(init=False)
    inner_chain: Tensor = field(init=False)

    def __post_init__(self) -> None:
        transform = self.transform
        basis = transform.basis[..., : self.bits.shape[1]].contiguous()
        outputs = torch.cat([transform.chain_out, transform.first[:, None]], 1)
        # the top layer says nothing: the chain of the lowest, which is zero, comes round
        chain = torch.cat(transform.chain_in.roll(-1, 0).chunk(2, dim=1), -1)
        inner = torch.cat([outputs @ chain, basis.mT @ chain], 1)
        for name, x in (("basis", basis), ("outputs", outputs), ("chain", chain), ("inner_chain", inner)):
            object.__setattr__(self, name, x)

    @classmethod
    def fit(
        cls,
        transform: Transform,
        z: Tensor,
        is_first: Tensor,
        known: int,
        budget: int,
        coordinates: int,
        bits: int | None = None,
    ) -> SketchCode:
        """Spend `budget` bits a token where they lower the error most, measured on clean vectors z [N, P, T, D].

        `bits`: of every coordinate that is coded, in place of what it is worth. The lowest `known` layers follow from
        the token ids and get none. The innovation is that from the decoded layer below, whose own error depends on the
        bits: a few rounds settle it.
        """
        variance = transform.variance[:, :coordinates].clone()
        variance[:known] = 0
        for _ in range(3):
            code = cls(transform, allot_bits(variance, budget, fixed=bits), variance.sqrt().clamp_min(SCALE_LIMIT))
            below = None
            for layer in range(len(variance)):
                innovation, _, below = code.code_layer(layer, z[:, layer], below, is_first)
                if layer < known:
                    below = code.tell(layer, z[:, layer])
                else:
                    variance[layer] = innovation[~is_first].square().mean(0)
        return cls(transform, code.bits, variance.sqrt().clamp_min(SCALE_LIMIT))

    def to_bytes(self) -> bytes:
        """The content of a safetensors file, without the transform."""
        return safetensors.torch.save({"bits": self.bits.cpu(), "spread": self.spread.cpu()})

    @property
    def digest(self) -> str:
        """sha256 of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def bits_per_token(self) -> int:
        """Of one token, over all layers."""
        return int(self.bits.sum())

    def write(self, z: Tensor, is_first: Tensor, known: Tensor) -> list[Tensor]:
        """Codes of clean vectors z [B, P, T, D] by layer, uint8 [B, T, m]; known [B, j, T, D] are the lowest layers."""
        below, written = None, []
        for layer in range(self.transform.num_layers):
            _, codes, below = self.code_layer(layer, z[:, layer], below, is_first)
            if layer < known.shape[1]:
                below = self.tell(layer, known[:, layer])
            written.append(codes)
        return written

    def code_layer(
        self, layer: int, z: Tensor, below: Tensor | None, is_first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Innovation and codes [B, T, m] of vectors z [B, T, D] of one layer; what they say of the next [B, T, 2 q].

        below [B, T, 2 q]: what the layer below says, with one token more in front where there is one.
        """
        inputs = self._inputs(below, is_first)
        innovation = (z - inputs @ self.outputs[layer]) @ self.basis[layer]
        scaled = innovation / self.spread[layer]
        # the first token is often the same in every text: its innovation is zero but for rounding, and zero is the
        # boundary of two cells, so that the last bit would choose one of them
        rounding = is_first[..., None] & (scaled.abs() < ROUNDING)
        codes = encode(scaled.masked_fill(rounding, 0.0), self.bits[layer])
        return innovation, codes, self._say(layer, inputs, codes)

    def tell(self, layer: int, z: Tensor) -> Tensor:
        """What a layer whose vectors z [B, T, D] are known says of the next one [B, T, 2 q]."""
        return z @ self.chain[layer]

    def understand(self, codes: list[Tensor], is_first: Tensor, known: Tensor) -> Sketch:
        """What stored codes say, given the lowest layers, known [B, j, T, D]."""
        below, sketch = None, Sketch(codes, [], [])
        for layer in range(self.transform.num_layers):
            inputs = self._inputs(below, is_first)
            if layer < known.shape[1]:
                below = self.tell(layer, known[:, layer])
            else:
                below = self._say(layer, inputs, codes[layer])
            sketch.inputs.append(inputs)
            sketch.said.append(below)
        return sketch

    def reconstruct(self, layer: int, sketch: Sketch) -> tuple[Tensor, Tensor]:
        """A layer as predicted from the one below, and as its codes say; [B, T, D] each."""
        predicted = sketch.inputs[layer] @ self.outputs[layer]
        return predicted, predicted + self._decode(layer, sketch.codes[layer]) @ self.basis[layer].mT

    def uncertainty(self, layer: int) -> Tensor:
        """Variance [m] that the code leaves of each coordinate."""
        left = torch.tensor([distortion(bits) for bits in self.bits[layer].tolist()])
        return self.spread[layer].square() * left.to(self.spread)

    def residual(self, layer: int, innovation: Tensor, codes: Tensor) -> Tensor:
        """How far an innovation [B, T, m] lies outside of the stored cells, in standard deviations; 0 inside."""
        low, high = cell(codes, self.bits[layer])
        y = innovation / self.spread[layer]
        return (y - high).clamp_min(0) + (y - low).clamp_max(0)

    def residual_of(self, layer: int, x: Tensor, inputs: Tensor, codes: Tensor) -> Tensor:
        """Largest residual [B, T] of stored, unrotated vectors x [B, T, D]: one projection, and no full vector formed.

        inputs [B, T, q + 1] and codes [B, T, m]: those of the layer in a `Sketch`.
        """
        own = self._coded[layer]
        if len(own.which) == 0:
            return x.new_zeros(x.shape[:-1])
        innovation = x @ own.axes - (inputs @ own.echo + own.centre)
        low, high = cell(codes[..., own.which], self.bits[layer, own.which])
        return (innovation - innovation.clamp(low, high)).abs().amax(-1)

    def restored(self, layer: int, inputs: Tensor, codes: Tensor) -> Tensor:
        """Stored, unrotated vectors [n, D] as codes say, from inputs [n, q + 1] and codes [n, m] of a `Sketch`."""
        own = self._coded[layer]
        innovation = decode(codes[..., own.which], self.bits[layer, own.which]) * own.spread
        return torch.addmm(self.transform.mean[layer], torch.cat([inputs, innovation], -1), own.back)

    @cached_property
    def _coded(self) -> list[_Coded]:
        """By layer: what `residual_of` and `restored` need of it."""
        layers = []
        for layer, bits in enumerate(self.bits):
            which = bits.nonzero()[:, 0]
            mean, scale = self.transform.mean[layer], self.transform.scale[layer]
            basis, spread, outputs = self.basis[layer][:, which], self.spread[layer, which], self.outputs[layer]
            axes = scale[:, None] * basis / spread
            back = torch.cat([outputs, basis.T]) / scale
            layers.append(_Coded(which, spread, axes, outputs @ basis / spread, mean @ axes, back))
        return layers

    def _inputs(self, below: Tensor | None, is_first: Tensor) -> Tensor:
        """Inputs [B, T, q + 1] of the prediction; with nothing below (None) it is the mean."""
        first = is_first[..., None].to(self.outputs.dtype)
        if below is None:
            return F.pad(first, (self.outputs.shape[1] - 1, 0))
        own, after = below.chunk(2, dim=-1)
        length = is_first.shape[1]
        inputs = own[:, -length:] + F.pad(after, (0, 0, 1, 0))[:, -length - 1 : -1]
        return torch.cat([inputs * (1 - first), first], -1)

    def _say(self, layer: int, inputs: Tensor, codes: Tensor) -> Tensor:
        return torch.cat([inputs, self._decode(layer, codes)], -1) @ self.inner_chain[layer]

    def _decode(self, layer: int, codes: Tensor) -> Tensor:
        """Innovations [B, T, m] that the codes stand for."""
        return decode(codes, self.bits[layer]) * self.spread[layer]
