"""Families D (token-aware) and E (sketch-assisted): repair of each cached token by what can be known about it.

D knows how layers follow from one another, the damaged numbers of the token and, with the prior, its id. E also has a
few protected bits a token, written when the token was. Both repair a stored cache as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachemedic.repair.attach import FORWARD_HOOKS
from cachemedic.repair.attention import Attention, Gates
from cachemedic.repair.config import OperatorConfig
from cachemedic.repair.inward_clamp import InwardClamp
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.registry import register_family
from cachemedic.token.layerwise.depth_filter import FEATURES, OUTPUTS, TINY, LayerStatistics, Sight, estimate, weigh
from cachemedic.token.layerwise.forward_call import announce
from cachemedic.token.layerwise.observation import Observation
from cachemedic.token.layerwise.options import check_options, coordinates
from cachemedic.token.layerwise.sketch_code import Sketch, SketchCode
from cachemedic.token.layerwise.statistics_files import read_statistics, statistics_files
from cachemedic.token.layerwise.transform import Transform

DEAD_ZONE = 1e-3  # standard deviations: rounding differs between batch shapes, and must not look like damage
STRENGTH_GAIN = 32.0  # the step of `strength` from 0, the identity, to 1 takes an optimiser few updates


@dataclass(frozen=True, eq=False)
class Repair:
    """correction [N, P, T, D], what to add to the stored token vectors (keys rotated as stored), zero for sound tokens;
    bias [N, P, T, G] for their attention logits; suspicion [N, P, T]: a score of damage.
    """

    correction: Tensor
    bias: Tensor
    suspicion: Tensor


@dataclass(eq=False)
class _Walk:
    """What the walk carries from layer to layer: the repaired vectors below, the variance left in them, how far the
    token was off at the layers that its id tells and at the layer below, and what was read of the highest known layer.
    """

    below: Tensor | None
    left: Tensor
    known_off: Tensor
    below_off: Tensor
    read_below: Tensor | None = None
    exchanged: Tensor | None = None


@register_family("layerwise-D")
class TokenAware(RepairOperator):
    """Family D: needs nothing stored; `calibrate` gives it a transform, without which it is the identity.

    Options: `known_layers`: how many of the lowest layers are computed from the token ids (0: no prior); `coordinates`
    of the innovation, as a mean over the heads of keys and values; `hidden` units of the network; `per_layer` networks
    in place of one for all; `window`: neighbours on each side that it hears of; `rounds` of projection (0: damaged
    numbers are not used; E then replaces a damaged token by what its code says, and has no network to ask); `bias`:
    whether attention gets its logit bias; `correction`: whether tokens are corrected.
    """

    default_options: dict[str, Any] = {
        "known_layers": 1, "coordinates": 16, "hidden": 24, "per_layer": False, "window": 8, "rounds": 3, "bias": False,
        "correction": True,
    }  # fmt: skip
    # of the network's outputs: what is in doubt is replaced, and training learns what to leave; the other way round a
    # token that was exchanged as a whole would look sound at every layer but the lowest
    start = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0])
    strength: Tensor
    w_in: Tensor
    embedding: Tensor
    w_out: Tensor
    b_out: Tensor
    prior_scale: Tensor

    def __init__(self, config: OperatorConfig, parameters: dict[str, Tensor]) -> None:
        super().__init__(config, parameters)
        self.transform: Transform | None = None
        self.code: SketchCode | None = None
        self._layers: list[LayerStatistics] = []
        self._amplification: list[Tensor] = []

    @classmethod
    def initial_parameters(cls, config: OperatorConfig, generator: torch.Generator) -> dict[str, Tensor]:
        options, layers = config.options, len(config.layers)
        check_options(config)
        hidden, places = options["hidden"], layers if options["per_layer"] else 1
        return {
            "strength": torch.zeros(1),
            "w_in": torch.randn(places, FEATURES, hidden, generator=generator) * (0.3 / FEATURES**0.5),
            "embedding": torch.randn(layers, 2 * config.model.num_kv_heads, hidden, generator=generator) * 0.1,
            "w_out": torch.randn(places, hidden, OUTPUTS, generator=generator) * (0.3 / hidden**0.5),
            "b_out": cls.start.expand(places, -1).clone(),
            "prior_scale": torch.zeros(layers, coordinates(config)),
        }

    def _like(self, config: OperatorConfig, parameters: dict[str, Tensor]) -> TokenAware:
        other = type(self)(config, parameters)
        if self.transform is not None:
            other.hold(self.transform, self.code)
        return other

    @property
    def idle_because(self) -> str | None:
        return "it knows no clean tokens yet: calibrate it" if self.transform is None else None

    def _held(self) -> object:
        return self.transform and self.transform.digest, self.code and self.code.digest

    def _files_beside(self) -> dict[str, bytes | None]:
        return statistics_files(self.transform, self.code)

    def _read_beside(self, folder: Path, named: str | None) -> None:
        if found := read_statistics(folder, named):
            self.hold(*found)

    def attend(
        self, layer: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Gates]:
        """Plain attention: D and E repair what is stored (`scrub`), not what one layer reads."""
        return *attention(query, key, value), (None, None)

    @property
    def known_layers(self) -> int:
        """How many of the protected layers are computed from the token ids."""
        return sum(layer < self.config.options["known_layers"] for layer in self.layers)

    def hold(self, transform: Transform, code: SketchCode | None = None) -> None:
        """Gives the operator its statistics of clean tokens, and E its code.

        Raises `ValueError` for a transform of another shape.
        """
        width = 2 * self.config.model.num_kv_heads * self.head_dim
        if (transform.num_layers, transform.width) != (len(self.layers), width):
            raise ValueError(
                f"a transform of {transform.num_layers} layers and {transform.width} numbers a token does not fit an "
                f"operator of {len(self.layers)} layers and {width}"
            )
        device = self.strength.device
        self.transform = transform = transform.to(device)
        self.code = None if code is None else SketchCode(transform, code.bits.to(device), code.spread.to(device))
        m, heads = self.prior_scale.shape[-1], 2 * self.config.model.num_kv_heads
        self._layers = [
            LayerStatistics.of(axes, variance, m, heads)
            for axes, variance in zip(transform.basis, transform.variance, strict=True)
        ]
        self._amplification = [
            (into[: transform.width] @ (out_of @ of_layer.basis)).square().sum(0)
            for into, out_of, of_layer in zip(transform.chain_in, transform.chain_out, self._layers, strict=True)
        ]

    def _apply(self, fn: Any, recurse: bool = True) -> TokenAware:
        super()._apply(fn, recurse)
        if self.transform is not None:
            self.hold(self.transform, self.code)  # to the device where the parameters are now
        return self

    def strengths(self, rows: int) -> Tensor:
        """The share [rows, 1] of a correction that is made, in 0 to 1, for the runs' rows."""
        return InwardClamp.apply(self.strength * STRENGTH_GAIN).repeat_interleave(rows // self.runs, 0)

    def repair(self, seen: Observation, known: Tensor, sketch: Sketch | None = None) -> Repair:
        """Repairs an observed cache of R*B rows.

        known [R*B, j, T, D]: the lowest j layers as the token ids say, unrotated, in units of the scale; sketch: what E
        stored.
        """
        assert self.transform is not None  # `calibrate` attaches it
        strength = self.strengths(len(seen.z))
        nothing = torch.zeros_like(seen.z[:, 0, :, 0])
        walk = _Walk(None, nothing[..., None], nothing, nothing)
        parts: list[tuple[Tensor, ...]] = []
        for layer in range(seen.z.shape[1]):
            if layer < known.shape[1]:
                parts.append(self._known_layer(walk, seen, layer, seen.rotation.redo(known[:, layer]), strength))
            else:
                parts.append(self._layer(walk, seen, layer, sketch, strength))
        correction, bias, suspicion = (torch.stack(x, 1) for x in zip(*parts, strict=True))
        padding = (seen.positions < 0)[:, None, :, None]
        correction = (correction / self.transform.scale[:, None]).masked_fill(padding, 0)
        return Repair(correction, bias.masked_fill(padding, 0), suspicion.masked_fill(padding[..., 0], 0))

    def _known_layer(
        self, walk: _Walk, seen: Observation, layer: int, exact: Tensor, strength: Tensor
    ) -> tuple[Tensor, ...]:
        """A layer that the token ids tell."""
        read = seen.z[:, layer]
        off = (read - exact).abs().amax(-1)
        hit = (off > seen.tolerance) | seen.implausible[:, layer]
        size = exact.square().mean(-1).clamp_min(seen.tolerance**2)  # padding has none
        walk.known_off = walk.below_off = (read - exact).square().mean(-1) / size
        correction = (strength * hit)[..., None] * (exact - read) * self.config.options["correction"]
        walk.below = seen.rotation.undo(read + correction)
        walk.read_below = seen.rotation.undo(read)
        return correction, read.new_zeros(*read.shape[:2], self.config.model.num_kv_heads), off

    def _layer(
        self,
        walk: _Walk,
        seen: Observation,
        layer: int,
        sketch: Sketch | None,
        strength: Tensor,
    ) -> tuple[Tensor, ...]:
        """Any other layer: judged by the network, estimated by the filter."""
        assert self.transform is not None
        read, lost, statistics = seen.z[:, layer], seen.lost[:, layer], self._layers[layer]
        residual = torch.zeros_like(walk.known_off)
        hit = torch.ones_like(residual, dtype=torch.bool)
        if sketch is None or self.code is None:
            base = self.transform.predict(layer, walk.below, seen.is_first)
        else:
            predicted, base = self.code.reconstruct(layer, sketch)
            innovation = (seen.rotation.undo(read) - predicted) @ statistics.basis
            residual = self.code.residual(layer, innovation, sketch.codes[layer]).abs().amax(-1)
            # zeros alone are no sign: sound numbers round to it
            hit = (residual > DEAD_ZONE) | seen.implausible[:, layer]
        base = seen.rotation.redo(base)
        options = self.config.options
        whole = (strength * hit)[..., None] * options["correction"]
        if sketch is not None and options["rounds"] == 0:  # the code's word is final
            return whole * (base - read), read.new_zeros(*read.shape[:2], self.config.model.num_kv_heads), residual
        if walk.read_below is not None:
            walk.exchanged = self._exchanged(walk.read_below, seen, layer, base)
            walk.read_below = None
        exchanged = torch.ones_like(residual) if walk.exchanged is None else walk.exchanged
        told = (residual, walk.known_off, walk.below_off, exchanged)
        sight = Sight(read - base, lost, seen.grain[:, layer], self._prior(layer, walk.left), told)
        evidence = weigh(statistics, sight, seen.positions, seen.rotation, options["window"])
        found = estimate(
            statistics, sight, evidence, self._judge(layer, evidence.features), seen.rotation, options["rounds"]
        )
        gate = found.gate * whole
        correction = gate * (base + found.innovation - read)
        walk.below, walk.below_off = seen.rotation.undo(read + correction), evidence.damage
        walk.left = found.variance if sketch is None else walk.left
        suspicion = gate.mean(-1) if sketch is None else residual
        bias = found.bias * (strength * hit)[..., None] * options["bias"]
        return correction, bias, suspicion

    def _exchanged(self, read_below: Tensor, seen: Observation, layer: int, base: Tensor) -> Tensor:
        """How well the token follows from what its id tells, over how well from what was read of it below [N, T].

        Large where all layers hold another token, which is consistent in itself: it must not be believed any more.
        """
        assert self.transform is not None
        following = seen.rotation.redo(self.transform.predict(layer, read_below, seen.is_first))
        read = seen.z[:, layer]
        return (read - base).square().mean(-1) / ((read - following).square().mean(-1) + TINY)

    def _prior(self, layer: int, left: Tensor) -> Tensor:
        """Variance [N, T, m] of the innovation about its base."""
        assert self.transform is not None
        scale = self.prior_scale[:, layer].exp().repeat_interleave(len(left) // self.runs, 0)[:, None]
        if self.code is None:
            variance = self.transform.variance[layer, : scale.shape[-1]]
            return (variance + left * self._amplification[layer]) * scale
        return self.code.uncertainty(layer).expand(*left.shape[:2], -1) * scale

    def _judge(self, layer: int, features: Tensor) -> Tensor:
        """The network: features [R*B, T, H', F] -> [R*B, T, H', OUTPUTS]."""
        place = layer if self.config.options["per_layer"] else 0
        heads = features.shape[-2]
        x = features.reshape(self.runs, -1, features.shape[-1])
        hidden = torch.bmm(x, self.w_in[:, place]).unflatten(1, (-1, heads)) + self.embedding[:, None, layer]
        decided = torch.baddbmm(self.b_out[:, place, None], torch.tanh(hidden).flatten(1, 2), self.w_out[:, place])
        return decided.view(*features.shape[:-1], OUTPUTS)


@register_family("layerwise-E")
class SketchAssisted(TokenAware):
    """Family E: D with a protected code of each token; the exact identity on tokens whose code is what was stored.

    Options beyond those of D: `share`: bytes of the sketch over those of a bf16 cache; `projection`: axes of the
    innovation that are coded, "principal", "random" or "learned"; `bits`: of every coordinate that is coded (None: as
    many as its variance is worth).
    """

    default_options = TokenAware.default_options | {"share": 1 / 32, "projection": "principal", "bits": None}


FORWARD_HOOKS[TokenAware] = announce
