"""How well a score tells damaged entries from sound ones."""

from __future__ import annotations

import scipy.stats
import torch


def detection_auroc(scores: torch.Tensor, damaged: torch.Tensor) -> float:
    """The probability that a damaged entry scores above a sound one, ties counted half: the area under the ROC curve.

    scores, damaged: real and bool tensors of one shape. From ranks (Mann and Whitney 1947), so exact with ties. NaN
    where all entries or none are damaged: there is nothing to tell apart. Raises `ValueError` for shapes that differ
    and for scores that are NaN.
    """
    if scores.shape != damaged.shape:
        raise ValueError(f"every score needs its label: got {tuple(scores.shape)} and {tuple(damaged.shape)}")
    if scores.isnan().any():
        raise ValueError("scores must not be NaN: they cannot be ranked")
    hit = damaged.flatten().cpu().numpy()
    n_hit, n_sound = int(hit.sum()), int((~hit).sum())
    if not n_hit or not n_sound:
        return float("nan")
    ranks = scipy.stats.rankdata(scores.double().flatten().cpu().numpy())
    return float((ranks[hit].sum() - n_hit * (n_hit + 1) / 2) / (n_hit * n_sound))
