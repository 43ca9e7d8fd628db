"""Weights of sequences by their saliency: w_i = exp(lambda (s_i - mean s) / (std s + 1e-8)), computed in log space."""

from __future__ import annotations

import math

import torch

EPS = 1e-8
ROUNDING = 1e-12  # a share of the whole weight that counts as none


def valence_weights(
    saliency: torch.Tensor,
    lam: float | torch.Tensor = 6.0,
    normalise: bool = False,
    max_weight: float | None = None,
) -> torch.Tensor:
    """The weights of B sequences from their saliencies [..., B], by the statistics of the batch (the last axis).

    Without options the formula wherever it is finite (std of B - 1 degrees of freedom); a batch of one sequence, or of
    equal saliencies, has weight 1. `normalise`: the mean weight is 1; `max_weight`: no weight is larger; with both,
    what the cap takes goes to the other sequences. A gradient flows to `lam` alone, if that is a tensor that asks for
    one.

    Raises `ValueError` for saliencies that are not finite, options out of range, or a weight beyond the number format.
    """
    if saliency.numel() == 0 or not saliency.is_floating_point() or not saliency.isfinite().all():
        raise ValueError(f"saliency must be finite floating-point numbers, at least one, not {saliency}")
    strength = torch.as_tensor(lam, device=saliency.device)
    if not (strength.isfinite() & (strength >= 0)).all():
        raise ValueError(f"lam must be a finite number from 0 upwards, not {lam}")
    least = 1.0 if normalise else 0.0  # the mean of normalised weights is 1
    if max_weight is not None and not (max_weight >= least and max_weight > 0 and math.isfinite(max_weight)):
        raise ValueError(f"max_weight must be {'at least 1 with normalise' if normalise else 'positive'}: {max_weight}")
    dtype = torch.promote_types(saliency.dtype, torch.float32)
    logs = strength.double() * _standardised(saliency.detach().double())
    if normalise:
        logs = logs - logs.logsumexp(-1, keepdim=True) + math.log(saliency.shape[-1])
        if max_weight is not None:
            logs = _capped(logs, math.log(max_weight))
    elif max_weight is not None:
        logs = logs.clamp_max(math.log(max_weight))
    weights = logs.exp().to(dtype)
    if not weights.isfinite().all():
        raise ValueError(
            f"a weight of exp({float(logs.max()):.1f}) is beyond {dtype}: set normalise or max_weight, or lower lam"
        )
    return weights


def _standardised(s: torch.Tensor) -> torch.Tensor:
    """(s - mean) / (std + 1e-8) of [..., B]; zero where all are equal, not what rounding makes of 0 / 1e-8."""
    low, high = s.amin(-1, keepdim=True), s.amax(-1, keepdim=True)
    if s.shape[-1] == 1:
        return torch.zeros_like(s)
    unit = (high / 2 - low / 2).clamp_min(torch.finfo(s.dtype).tiny)  # squares of large numbers leave the format
    scaled = (s - low) / unit
    centred = scaled - scaled.mean(-1, keepdim=True)
    z = centred / (scaled.std(-1, keepdim=True) + EPS / unit)
    return torch.where(high == low, 0.0, z)


def _capped(logs: torch.Tensor, cap: float) -> torch.Tensor:
    """Logarithms of weights of mean 1 [..., B], none above `cap`: the others share what is left in proportion.

    The largest weights are capped, as few as possible. Where these carry the whole weight, the others have weight zero.
    """
    count = logs.shape[-1]
    order = logs.sort(-1, descending=True)
    others = order.values.flip(-1).logcumsumexp(-1).flip(-1)  # log of the sum of the i-th and all smaller weights
    left = count - torch.arange(count, device=logs.device) * math.exp(cap)  # the weight of these if i are capped
    left = torch.where(left > ROUNDING * count, left, 0.0).to(logs.dtype)
    shared = order.values + left.log() - others  # what the i-th weight then is
    fits = (shared <= cap + ROUNDING) | (left == 0)
    capped = fits.int().argmax(-1, keepdim=True)  # the first that fits: one always does, as the cap is 1 or more
    shift = left.log().expand_as(others).gather(-1, capped) - others.gather(-1, capped)
    rank = order.indices.argsort(-1)
    return torch.where(rank < capped, cap, (logs + shift).clamp_max(cap))
