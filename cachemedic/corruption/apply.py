"""Corrupts key/value caches: a batch of stacked tensors with one event per sample, or a Hugging Face cache.

The fault is in storage: a cache is written clean, corrupted once, and stays corrupted.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeVar

import torch
import torch.nn.functional as F
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import BaseQuantizedLayer, DynamicLayer

from cachemedic.core.errors import check_given
from cachemedic.core.integers import seed_number
from cachemedic.core.severity_map import GRID, SeverityMap, Shape
from cachemedic.corruption.severity import shipped_map
from cachemedic.corruption.spec import CorruptionEvent, CorruptionSpec, draw_event
from cachemedic.corruption.types import CORRUPTIONS, ROTATION_SEED_TEST, ROTATION_SEED_TRAIN, Stored, check_type

AnyCache = TypeVar("AnyCache", bound=Cache)

MIXTURE_WEIGHTS = {
    "gaussian": 0.25, "dropout_zero": 0.20, "orthogonal_rotation": 0.15, "bitflip_sparse": 0.15, "quant_noise": 0.15,
    "contiguous_overwrite": 0.10,
}  # fmt: skip
CLEAN_SHARE = 0.2
MASKED_SHARE = 0.5  # of the corrupted samples: random heads and positions instead of all
LEAST_HEAD_PROBABILITY = 0.25


def corrupt(
    k: torch.Tensor,
    v: torch.Tensor,
    events: Sequence[CorruptionEvent],
    generator: torch.Generator,
    donor_k: torch.Tensor | None = None,
    donor_v: torch.Tensor | None = None,
    rotation_seed: int = ROTATION_SEED_TRAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrupted copies of `k` and `v` [B, L, G, T, d], sample b by `events[b]`; what no mask hits keeps every bit.

    Donors [B, L, G, T' >= T, d] are needed for types that write another prompt's cache over this one. An event drawn
    for fewer positions than T hits the newest ones (left padding), one drawn for more keeps its newest part (a sliding
    window).
    Raises `ValueError` where events or donors do not fit the tensors.
    """
    _check(k, v, events, donor_k, donor_v)
    corrupted = k.clone(), v.clone()
    # One sample at a time: it stays in the processor cache, which is twice as fast as all samples of a type together.
    for row, event in enumerate(events):
        if not event.is_active:
            continue
        hit = _hit(event, k.shape[3]).to(k.device)
        for result, donor, is_key in zip(corrupted, (donor_k, donor_v), (True, False), strict=True):
            x = result[row]
            given = None if donor is None else donor[row, ..., : k.shape[3], :]
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            stored = Stored(wide, event.parameter, hit, generator, given, rotation_seed, is_key, event.offset)
            result[row] = torch.where(hit, CORRUPTIONS[event.type].rule(stored).to(x), x)
    return corrupted


def _hit(event: CorruptionEvent, n_positions: int) -> torch.Tensor:
    """The entries that the event hits, [L, G, T, 1]; masks are aligned at the newest position."""
    newest = event.time[-n_positions:]
    time = F.pad(newest, (n_positions - len(newest), 0))
    return (event.layers[:, None] & event.heads)[..., None, None] & time[:, None]


def _check(
    k: torch.Tensor,
    v: torch.Tensor,
    events: Sequence[CorruptionEvent],
    donor_k: torch.Tensor | None,
    donor_v: torch.Tensor | None,
) -> None:
    if k.dim() != 5 or k.shape[:4] != v.shape[:4]:
        raise ValueError(f"keys and values must be [B, L, G, T, d] alike, got {tuple(k.shape)} and {tuple(v.shape)}")
    if not (k.is_floating_point() and v.is_floating_point()):
        raise ValueError(
            f"keys and values must be floating-point numbers, not {k.dtype} and {v.dtype}: dequantise them"
        )
    if len(events) != k.shape[0]:
        raise ValueError(f"{k.shape[0]} samples need as many events, got {len(events)}")
    for event in events:
        if event.heads.shape != k.shape[1:3]:
            raise ValueError(
                f"an event drawn for {tuple(event.heads.shape)} layers and heads does not fit a cache of "
                f"{tuple(k.shape[1:3])}"
            )
    needy = [event.type for event in events if event.is_active and CORRUPTIONS[event.type].needs_donor]
    if needy:
        for tensor, donor in ((k, donor_k), (v, donor_v)):
            batch, layers, heads, positions, dim = tensor.shape
            if donor is None:
                raise ValueError(f"{needy[0]} needs a donor cache, got none")
            if donor.dim() != 5 or donor.shape[:3] != tensor.shape[:3] or donor.shape[-1] != dim:
                raise ValueError(
                    f"a donor for {tuple(tensor.shape)} must be [{batch}, {layers}, {heads}, >= {positions}, {dim}], "
                    f"got {tuple(donor.shape)}"
                )
            if donor.shape[3] < positions:
                raise ValueError(f"the donor holds {donor.shape[3]} positions, {needy[0]} needs {positions}")


def corrupt_cache(cache: AnyCache, spec: CorruptionSpec, seed: int = 0, donor: Cache | None = None) -> AnyCache:
    """A corrupted copy of a Hugging Face cache, of the same class; `cache` and its tensors stay as they are.

    Every sample of the batch draws its own event from `spec`. Layers may hold different numbers of positions (sliding
    windows): masks are aligned at the newest position. `donor` is a cache with as many layers, samples and heads, no
    shorter. Rotations are by the matrix of evaluation, not by that of training.
    Raises `ValueError` for an empty cache or one of whole numbers, and where `spec` or `donor` does not fit,
    `TypeError` for layers other than those of a `DynamicCache` (preallocated, quantised or recurrent ones).
    """
    check_given("cache", cache, Cache)
    check_given("spec", spec, CorruptionSpec)
    if donor is not None:
        check_given("donor", donor, Cache)
    stored = _stored(cache)
    donors = [(None, None)] * len(stored) if donor is None else _stored(donor)
    if len(donors) != len(stored):
        raise ValueError(f"the donor holds {len(donors)} layers, the cache {len(stored)}")
    batch, heads = stored[0][0].shape[:2]
    shape = (len(stored), heads, max(keys.shape[2] for keys, _ in stored))
    generator = torch.Generator().manual_seed(seed_number(seed))
    events = [draw_event(spec, shape, generator) for _ in range(batch)]
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    for index, layer in enumerate(result.layers):
        k, v = (x[:, None] for x in stored[index])
        donor_k, donor_v = (x[:, None] if x is not None else None for x in donors[index])
        at_layer = [event.at_layer(index) for event in events]
        k, v = corrupt(k, v, at_layer, generator, donor_k, donor_v, ROTATION_SEED_TEST)
        layer.keys, layer.values = k[:, 0], v[:, 0]  # type: ignore[union-attr]  # `_stored` checked the layers
    return result


def _stored(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values [B, G, T, d] of every layer."""
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise TypeError(f"only a DynamicCache can be corrupted, not {type(cache).__name__}; give the cache of one part")
    stored = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer) or isinstance(layer, BaseQuantizedLayer):
            raise TypeError(
                f"layer {index} is a {type(layer).__name__}; only layers of a DynamicCache can be corrupted"
            )
        if layer.keys is None or layer.values is None or layer.keys.numel() == 0:
            raise ValueError(f"layer {index} of the cache is empty; prefill it first")
        stored.append((layer.keys, layer.values))
    if not stored:
        raise ValueError("the cache is empty; prefill it first")
    return stored


@dataclass(frozen=True)
class Mixture:
    """The distribution over events that operators train on: clean or not, then type, severity and masks.

    Weights need not sum to 1. Severities are drawn uniformly; a type whose calibrated map ends below one is drawn as
    far as it goes. Half of the corrupted samples are hit everywhere; of the other half each head with a probability
    drawn from [0.25, 1], at all positions, old ones or a window. `base` names the calibrated map (None: by the cache's
    shape).
    """

    weights: Mapping[str, float] = field(default_factory=MIXTURE_WEIGHTS.copy)
    clean_share: float = CLEAN_SHARE
    severities: tuple[float, ...] = GRID
    base: str | None = None

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            check_type(name, [known for known, corruption in CORRUPTIONS.items() if corruption.calibration])
            if not weight >= 0:
                raise ValueError(f"weight {weight!r} of {name} is out of range: a number from 0 upwards")
        total = sum(self.weights.values())
        if not total > 0:
            raise ValueError(f"a mixture needs at least one type of positive weight, got {dict(self.weights)}")
        if not 0 <= self.clean_share <= 1:
            raise ValueError(f"clean_share {self.clean_share!r} is out of range: a number from 0 to 1")
        if not self.severities or not all(severity > 0 for severity in self.severities):
            raise ValueError(f"severities {self.severities!r} must be at least one number above 0")
        object.__setattr__(self, "weights", {name: weight / total for name, weight in self.weights.items()})

    def without(self, name: str) -> Mixture:
        """The same mixture with one type left out, the other weights renormalised."""
        check_type(name, tuple(self.weights))
        return replace(self, weights={other: weight for other, weight in self.weights.items() if other != name})

    def draw(
        self, generator: torch.Generator, n: int, shape: Shape, severity_map: SeverityMap | None = None
    ) -> list[CorruptionEvent]:
        """Events of `n` samples of a cache of `shape` (L, G, T); every sample uses up the same number of draws.

        severity_map: what severities stand for (None: the map that ships).
        """
        calibrated = severity_map or shipped_map()
        return [draw_event(self._draw_spec(generator, shape, calibrated), shape, generator) for _ in range(n)]

    def _draw_spec(self, generator: torch.Generator, shape: Shape, calibrated: SeverityMap) -> CorruptionSpec:
        u = torch.rand(8, generator=generator, device=generator.device, dtype=torch.float64).tolist()
        clean, kind, strength, masked, head, mode, first, second = u
        if clean < self.clean_share:
            return CorruptionSpec("none")
        names = list(self.weights)
        name = names[min(bisect_right(list(accumulate(self.weights.values())), kind), len(names) - 1)]
        wanted = self.severities[int(strength * len(self.severities))]
        severity = min(wanted, calibrated.reach(name, self.base, shape))
        spec = CorruptionSpec(name, severity, base=self.base, severity_map=calibrated)
        if masked >= MASKED_SHARE:
            return spec
        heads = LEAST_HEAD_PROBABILITY + (1 - LEAST_HEAD_PROBABILITY) * head
        positions = shape[2]
        start = int(first * positions)
        times = (
            "all_past",
            ("old_only", int(first * (positions // 2 + 1))),
            ("window", start, start + 1 + int(second * (positions - start))),
        )
        return replace(spec, heads=heads, time=times[int(mode * len(times))])
