"""Identity loss and contraction ratio from Gram matrices: the repaired cache is never formed.

For X_rep = X_corr (I + M) with M = W diag(a) U^T and D = X_corr - X_clean,
    ||X_rep - X_clean||^2 = ||D||^2 + 2 tr(M^T X_corr^T D) + tr(M^T X_corr^T X_corr M),
and both traces need only d x d matrices per sample and head, shared by all runs that see the sample. The gate a differs
per query head and query; squared norms are summed over query heads and averaged over the M queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cachemedic.core.divergence import EPS, error_ratio

Factors = tuple[torch.Tensor, torch.Tensor]  # W, U: [R, d, r] each


@dataclass(frozen=True)
class Gram:
    """Second moments of one tensor (K or V) of one layer, S seeds x B samples x G heads."""

    second: torch.Tensor  # X_corr^T X_corr [S, B, G, d, d]
    cross: torch.Tensor  # D^T X_corr [S, B, G, d, d]
    found: torch.Tensor  # ||D||^2 summed over heads [S, B]
    clean: torch.Tensor  # ||X_clean||^2 summed over heads [S, B]

    @classmethod
    def of(cls, clean: torch.Tensor, corrupted: torch.Tensor) -> Gram:
        """From the clean and the corrupted tensor, [S, B, G, T, d] each."""
        delta = corrupted - clean
        found, size = (torch.linalg.vector_norm(x.flatten(2), dim=2).square() for x in (delta, clean))
        return cls(corrupted.mT @ corrupted, delta.mT @ corrupted, found, size)

    def deviation(self, factors: Factors, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two traces 2 tr(M^T X^T D) and tr(M^T X^T X M), per query head, mean over queries.

        `gate` [R, B, H, M, r] with R = S * C runs, seed-major. Returns two tensors [R, B], scaled like norms over the G
        stored heads.
        """
        w, u = factors
        seeds, samples, groups, dim, _ = self.second.shape
        runs, rank = w.shape[0], w.shape[-1]

        def by_seed(factor: torch.Tensor) -> torch.Tensor:  # [R, d, r] -> [S, d, C*r]
            return factor.unflatten(0, (seeds, -1)).transpose(1, 2).flatten(2)

        pairs = (by_seed(u)[:, :, None] * by_seed(w)[:, None]).flatten(1, 2)  # u w^T of every column: [S, d*d, C*r]
        linear = self.cross.reshape(seeds, samples * groups, -1) @ pairs  # diagonal of U^T D^T X W: [S, B*G, C*r]
        linear = linear.unflatten(2, (-1, rank)).transpose(1, 2).reshape(runs, samples, groups, 1, rank)
        times_w = (self.second.reshape(seeds, -1, dim) @ by_seed(w)).view(seeds, samples * groups, dim, -1, rank)
        inner = w.mT @ times_w.permute(0, 3, 2, 1, 4).reshape(runs, dim, -1)  # W^T X^T X W: [R, r, B*G*r]
        quadratic = inner.view(runs, rank, -1, rank) * (u.mT @ u)[:, :, None]
        quadratic = quadratic.transpose(1, 2).reshape(runs, samples, groups, rank, rank)
        per_group = gate.reshape(runs, samples, groups, -1, rank)  # query heads of a group and their queries
        first = 2 * (per_group * linear).sum(-1)
        second = ((per_group @ quadratic) * per_group).sum(-1)
        return first.mean(-1).sum(-1), second.mean(-1).sum(-1)


def layer_terms(
    keys: Gram,
    values: Gram,
    factors: Mapping[str, Factors],
    gates: tuple[torch.Tensor | None, torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    """`identity`, `rho`, `rho_k`, `rho_v` of one layer, [R, B]; rho_k and rho_v are NaN where that tensor is sound."""
    conditions = 1
    for gate in gates:
        if gate is not None:
            conditions = gate.shape[0] // keys.found.shape[0]
    left, moved = {}, {}
    for name, gram, gate in (("k", keys, gates[0]), ("v", values, gates[1])):
        found = gram.found.repeat_interleave(conditions, 0)
        if gate is None:
            left[name], moved[name] = found, torch.zeros_like(found)
        else:
            first, second = gram.deviation(factors[name], gate)
            left[name], moved[name] = found + first + second, second
    clean = (keys.clean + values.clean).repeat_interleave(conditions, 0)
    found_k, found_v = (g.found.repeat_interleave(conditions, 0).sqrt() for g in (keys, values))
    # a floor under the root: its gradient at zero is infinite
    left_k, left_v = (left[name].clamp_min(1e-12).sqrt() for name in "kv")
    return {
        "identity": (moved["k"] + moved["v"]) / (clean + EPS),
        "rho": error_ratio(left_k + left_v, found_k + found_v),
        "rho_k": torch.where(found_k > 0, error_ratio(left_k, found_k), torch.nan),
        "rho_v": torch.where(found_v > 0, error_ratio(left_v, found_v), torch.nan),
    }
