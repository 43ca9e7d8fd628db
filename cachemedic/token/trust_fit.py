"""A first training of the trust network, without the base: on faults of many kinds in clean caches.

For each part the squared error of the estimate is a quadratic form in the share a that is believed of what was read,

    (1 - a)^2 E_predicted + 2 a (1 - a) E_both + a^2 E_read,

of the mean products of the two errors, and a follows from the noise that the network says. The network learns to make
it small, over the size of the part, in seconds. E_read counts double there: what was read is often wrong in all parts
of a token in the same way, as after a rotation, which harms attention more than errors that cancel out. The repair
objective is what the network is then trained on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cachemedic.core.errors import nearest_valid
from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionEvent, CorruptionSpec, draw_event
from cachemedic.models.cache import stack_cache
from cachemedic.token.estimate import PartStatistics, Trust
from cachemedic.token.joint import SINKS
from cachemedic.token.kept import Prediction
from cachemedic.token.parts import DeviationModel
from cachemedic.token.token_repair import TokenOperator
from cachemedic.token.trust import features, network
from cachemedic.token.vectors import TokenVectors

RANGES = {  # of parameters: from harmless to what leaves little
    "gaussian": (0.05, 1.5),
    "dropout_zero": (0.02, 0.8),
    "orthogonal_rotation": (0.1, 1.0),
    "bitflip_sparse": (3e-4, 0.02),
    "quant_noise": (1, 4),
    "contiguous_overwrite": (8, 128),
}  # fmt: skip
PREFIX, DRAWS = 128, 12  # tokens of a window; faults of each type and window
SEEN = 32  # tokens of a window that are estimated under a fault: of more faults they teach more than all of a few
STEPS, BATCH, RATE = 1200, 8192, 1e-2
READ = 2.0  # what E_read counts; chosen on held-out calibration text
SAMPLES = 400_000  # parts, at most


class EstimatingOperator(TokenOperator):
    """A family that estimates damaged tokens and judges by a trust network how far to believe what was read."""

    deviations: DeviationModel | None  # of clean tokens from their prediction; None before calibration

    @abstractmethod
    def predict(self, prior: Any, codes: Tensor | None = None, like: Tensor | None = None) -> Prediction:
        """Of tokens, from codes [B, T, bytes] and the prior; c has no coordinates without codes (`like` [B, T, ...]:
        how many tokens).
        """

    @abstractmethod
    def estimate(
        self,
        vectors: TokenVectors,
        keys: Tensor,
        values: Tensor,
        prediction: Prediction,
        positions: Tensor,
        sound: Tensor | None = None,
        trust: Trust | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the protected layers as estimated; `trust` stands for the network where it is given."""


def fit_trust(
    operator: EstimatingOperator,
    model: PreTrainedModel,
    ids: Tensor,
    types: Sequence[str] = tuple(RANGES),
    seed: int = 0,
) -> None:
    """Trains the trust network of all runs on windows of text ids [N, T] under faults of these types, N at least 2.

    Raises `ValueError` for a type that it has no range of strengths for.
    """
    for kind in types:
        if kind not in RANGES:
            raise nearest_valid("type of fault that a trust network can be fitted to", kind, RANGES)
    generator = torch.Generator().manual_seed(seed)
    ids = ids[:, :PREFIX].to(model.device)
    truth, count = _Truth(operator, model, ids), SAMPLES // (len(types) * DRAWS)
    found = [truth.samples(kind, count, generator) for kind in types for _ in range(DRAWS)]
    x, part, products, noise, variance = (torch.cat(column) for column in zip(*found, strict=True))
    parameters = dict(operator.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        runs = x[rows].expand(operator.runs, -1, -1)
        more = network(parameters, runs, parameters["trust_part"][:, part[rows]])
        believed = variance[rows] / (variance[rows] + noise[rows] * more.exp())
        predicted, both, read = products[rows].unbind(-1)
        rest = 1 - believed
        loss = (rest.square() * predicted + 2 * believed * rest * both + READ * believed.square() * read).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class _Truth:
    """Clean caches of windows ids [N, T], the prediction of their tokens, and what is kept of them."""

    @torch.no_grad()
    def __init__(self, operator: EstimatingOperator, model: PreTrainedModel, ids: Tensor) -> None:
        assert operator.deviations is not None  # it is calibrated
        self.operator, self.deviations, self.layers = operator, operator.deviations, list(operator.layers)
        cache = DynamicCache()
        model.base_model(ids, past_key_values=cache, use_cache=True)
        self.keys, self.values = stack_cache(cache)
        self.positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        self.vectors = TokenVectors(model, operator.layers)
        self.kept = operator.write_tokens(model, self.keys, self.values, ids, self.positions)
        codes = None if self.kept is None else self.kept.codes
        prior = operator.prior(model, ids, self.positions)
        self.prediction = operator.predict(prior, codes, like=self.keys[:, 0, 0, :, :1])

    def _events(self, kind: str, generator: torch.Generator) -> list[CorruptionEvent]:
        """A fault of this kind for each window, of any strength, half of them everywhere."""
        low, high = RANGES[kind]
        shape = (self.keys.shape[1], self.keys.shape[2], self.keys.shape[3])
        events = []
        for _ in self.keys:
            u = torch.rand(4, generator=generator).tolist()
            strength = low * (high / low) ** u[0]
            strength = round(strength) if isinstance(low, int) else strength
            strength = min(strength, shape[2]) if kind == "contiguous_overwrite" else strength
            heads = "all" if u[1] < 0.5 else 0.25 + 0.75 * u[2]
            share = 1.0 if u[3] < 0.5 or kind == "contiguous_overwrite" else u[3]
            spec = CorruptionSpec(kind, parameter=strength, heads=heads, share=share)
            events.append(draw_event(spec, shape, generator))
        return events

    @torch.no_grad()
    def samples(self, kind: str, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Features [n, F], parts [n], error products [n, 3], noise and variance [n] of `count` parts so hit."""
        events = self._events(kind, generator)
        donors = self.keys.roll(1, 0), self.values.roll(1, 0)
        bad = corrupt(self.keys, self.values, events, generator, *donors)
        seen = torch.randperm(self.positions.shape[1], generator=generator)[:SEEN].sort().values
        positions, prediction = self.positions[:, seen], self.prediction.tokens(seen)
        sound = None if self.kept is None else self.kept.sound(bad[0], bad[1], self.layers)[:, seen]
        written, hit = ([x[:, self.layers][..., seen, :] for x in sides] for sides in ((self.keys, self.values), bad))
        collected: list[PartStatistics] = []

        def collect(statistics: PartStatistics) -> Tensor:
            # the next piece of the tokens writes where this one did
            own = {"residual": statistics.residual.clone(), "present": statistics.present.bool()}
            collected.append(replace(statistics, **own))
            return torch.zeros_like(statistics.noise)

        self.operator.estimate(self.vectors, hit[0], hit[1], prediction, positions, sound, collect)
        columns = {field.name: [getattr(piece, field.name) for piece in collected] for field in fields(PartStatistics)}
        statistics = PartStatistics(**{name: torch.cat(pieces, 1) for name, pieces in columns.items()})
        deviations = self.deviations
        read, clean = (deviations.parts.stack(*sides).float() for sides in (hit, written))
        off = deviations.parts.split((read - clean).nan_to_num() * deviations.scale)
        off_predicted = torch.where(statistics.present, off - statistics.residual, 0.0)
        off = torch.where(statistics.present, off, 0.0)
        pairs = (off_predicted, off_predicted), (off_predicted, off), (off, off)
        products = torch.stack([(a * b).mean(-1) for a, b in pairs], -1)
        wanted = ~statistics.exact & (positions >= SINKS)[..., None]
        if sound is not None:
            wanted &= ~sound[..., None].expand(*sound.shape, deviations.parts.heads).flatten(2)
        place = torch.arange(deviations.parts.count, device=wanted.device).expand(wanted.shape)
        chosen = wanted.flatten().nonzero().squeeze(1)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:count]]
        found = features(statistics), place, products / deviations.power, statistics.noise, statistics.variance
        return tuple(x.flatten(0, 2)[chosen] for x in found)
