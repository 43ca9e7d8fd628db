"""Saliency of a sequence: how promising, how safe, how certain and how steady its future is to the teacher."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ALPHA = (0.55, 0.20, 0.15, 0.10)
PARTS = ("mean", "minimum", "certainty", "coherence")


def saliency(
    trajectory: torch.Tensor, logits: torch.Tensor, alpha: tuple[float, float, float, float] = ALPHA
) -> torch.Tensor:
    """alpha_1 mean v + alpha_2 min v + alpha_3 (1 - entropy) + alpha_4 coherence, one number a sequence [...].

    trajectory [..., k, m]: the teacher's valence vectors over the next k >= 2 steps, each in [0, 1]^m, m >= 2, of which
    dimension 0 is the valence v; logits [..., M, V]: the teacher's.
    Raises `ValueError` for another shape or weights that are not four finite numbers.
    """
    if len(alpha) != len(PARTS) or not all(math.isfinite(a) for a in alpha):
        raise ValueError(f"alpha must be {len(PARTS)} finite numbers, for {', '.join(PARTS)}, not {alpha}")
    parts = saliency_parts(trajectory, logits)
    return torch.stack([a * parts[name] for a, name in zip(alpha, PARTS, strict=True)]).sum(0)


def saliency_parts(trajectory: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The four parts by name, [...] each, before they are weighted; arguments as for `saliency`.

    The entropy is that of the next-token distribution over log V, so that certainty lies in [0, 1], mean over the M
    tokens. Coherence is the mean cosine of consecutive 2 v - 1, which point away from indifference: of scalars every
    cosine would be 1 or -1, hence m >= 2.
    """
    if trajectory.dim() < 2 or trajectory.shape[-2] < 2 or trajectory.shape[-1] < 2:
        raise ValueError(f"a trajectory needs 2 or more steps of 2 or more dimensions, not {tuple(trajectory.shape)}")
    if logits.shape[:-2] != trajectory.shape[:-2] or logits.shape[-1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)} do not belong to a trajectory {tuple(trajectory.shape)}")
    valence, signed = trajectory[..., 0], 2 * trajectory - 1
    log_p = F.log_softmax(logits, -1)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1) / math.log(logits.shape[-1])
    return {
        "mean": valence.mean(-1),
        "minimum": valence.amin(-1),
        "certainty": 1 - entropy.mean(-1),
        "coherence": F.cosine_similarity(signed[..., 1:, :], signed[..., :-1, :], dim=-1).mean(-1),
    }
