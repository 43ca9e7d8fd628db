"""Whether tokens of a cache follow from their ids, for caches of which nothing was stored when they were written.

Three statistics of a token, each larger the less the token fits: how far its lowest layer is from what its id tells,
how far it is from what its id and those before make likely under the joint model, and how much of its worst layer the
model leaves unexplained. Thresholds are quantiles of clean tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cachemedic.core.errors import check_given
from cachemedic.models.cache import stack_cache
from cachemedic.token.coder import check_operator
from cachemedic.token.dense import check_cache_of
from cachemedic.token.given import tokens_given
from cachemedic.token.joint import SINKS
from cachemedic.token.joint_operator import JointOperator
from cachemedic.token.vectors import TokenVectors

STATISTICS = ("lowest layer", "given the ids", "worst layer")
LOWEST = 0  # of these
RATES = (0.001, 0.01, 0.05)  # of false alarms that thresholds are measured for
LEAST = 1e-4  # of the lowest layer: what rounding may do
LARGEST = 1e4  # numbers beyond it count as it: one flipped bit makes some whose squares are not finite


@dataclass(frozen=True, eq=False)
class Plausibility:
    """What `check_cache` found in T tokens of B rows.

    suspicious [B, T] bool; score [B, T]: the largest statistic over its threshold, above 1 where suspicious; by_layer
    [B, T, L']: what the joint model leaves unexplained of each layer, over what it does in a clean token; rate: of
    false alarms on clean tokens like those of calibration.
    """

    suspicious: Tensor
    score: Tensor
    by_layer: Tensor
    rate: float

    @property
    def tokens(self) -> list[tuple[int, int]]:
        """(row, slot) of each suspicious token."""
        return [(int(row), int(slot)) for row, slot in self.suspicious.nonzero()]

    def __str__(self) -> str:
        found, total = int(self.suspicious.sum()), self.suspicious.numel()
        return f"{found} of {total} tokens do not follow from their ids; {self.rate:.1%} of clean ones would not"


def check_cache(
    model: PreTrainedModel, operator: JointOperator, cache: Cache, ids: Tensor, rate: float = 0.01
) -> Plausibility:
    """Which tokens of a cache do not follow from the ids [B, T] that it is said to hold, without padding.

    operator: calibrated, of family D or E. Tokens that were exchanged, are stale, or lie in another layout or at
    another position stand out; a token as likely as the true one does not. False alarms are more frequent on kinds of
    text that calibration never saw.
    Raises `TypeError` for what is no model, no such cache or an operator of another family; `ValueError` for a model
    that is wrapped or in training mode, an operator that was not calibrated or is of another model, a cache of other
    layers or number formats, ids of another shape than the cache, and a rate that thresholds were not measured for.
    """
    length = check_cache_of(model, cache)
    check_operator(model, operator)
    check_given("rate", rate, float)
    if rate not in RATES:
        raise ValueError(f"the rate of false alarms must be one of {RATES}, not {rate!r}")
    if not operator.alarms:
        raise ValueError("this operator knows no thresholds of clean tokens: make it with `calibrate`")
    ids, _, _ = tokens_given(model, cache, ids, None, None)
    keys, values = (x[:, :, :, :length] for x in stack_cache(cache))
    found, by_layer = statistics(model, operator, keys, values, ids)
    score = found / torch.tensor(operator.alarms[str(rate)], device=found.device)
    score = score.amax(-1)
    return Plausibility(score > 1, score, by_layer, rate)


@torch.inference_mode()
def statistics(
    model: PreTrainedModel, operator: JointOperator, keys: Tensor, values: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Statistics [B, T, 3] of tokens and [B, T, L'] of their layers; keys and values [B, L, G, T, d] of all layers."""
    joint, deviations = operator.calibrated, operator.deviations
    assert deviations is not None  # as there is a joint model
    layers = list(operator.layers)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    x = TokenVectors(model, operator.layers).of(keys[:, layers], values[:, layers], positions)
    x = x.nan_to_num(nan=LARGEST).clamp(-LARGEST, LARGEST)
    prior = joint.prior(model, ids, positions)
    z = joint.standardise(x) - joint.expand_prior(prior).to(x.dtype)
    c = z @ deviations.axes.to(z.dtype).T
    rest = (z - c @ deviations.axes.to(z.dtype)).float()
    by_layer = rest.square().unflatten(-1, (len(layers), -1)).mean(-1)
    by_layer = by_layer / deviations.rest[0].unflatten(-1, (len(layers), -1)).mean(-1)
    off = c.float().square() / joint.variance[: c.shape[-1]].clamp_min(1e-6)
    width = prior.lowest.shape[-1]
    lowest = torch.zeros_like(by_layer[..., 0])
    if joint.lowest_is_exact:
        exact = prior.lowest.float()
        lowest = (x[..., :width].float() - exact).square().sum(-1) / exact.square().sum(-1)
    inner = (positions >= SINKS).float()  # the first tokens are of another kind
    return torch.stack([lowest, off.mean(-1) * inner, by_layer.amax(-1) * inner], -1), by_layer


def thresholds(found: Tensor) -> dict[str, list[float]]:
    """Of each rate of false alarms, what clean statistics [B, T, 3] stay below, shared evenly among the statistics."""
    clean = found[:, SINKS:].flatten(0, 1).double()
    limits = {str(rate): clean.quantile(1 - rate / len(STATISTICS), 0) for rate in RATES}
    for limit in limits.values():
        limit[LOWEST].clamp_(min=LEAST)
    return {rate: limit.tolist() for rate, limit in limits.items()}
