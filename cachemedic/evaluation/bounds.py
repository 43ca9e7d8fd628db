"""What a linear repair can do at best: two lower bounds on the contraction ratio rho.

A, B and C apply one linear map I + M, M of rank r, to all tokens of a head. For isotropic noise no such map leaves less
than sqrt(1 - r/d) of it. For corruption and clean vectors with measured second moments, the best map of a given rank is
known in closed form: reduced-rank regression of the error on the corrupted vectors (Izenman 1975).
"""

from __future__ import annotations

import math

import torch


def rank_floor(rank: int, head_dim: int) -> float:
    """The least share of the norm of isotropic noise that a map I + M with M of rank r leaves, in expectation."""
    if not 0 <= rank <= head_dim:
        raise ValueError(f"rank {rank} is out of range: 0 to the head size, {head_dim}")
    return math.sqrt(1 - rank / head_dim)


def linear_bound(clean: torch.Tensor, corrupted: torch.Tensor, rank: int | None = None) -> float:
    """The least rho = ||X_corr (I + M) - X|| / ||X_corr - X|| of any M of `rank` (None: of full rank).

    clean, corrupted [..., d]: all leading axes are pooled, so the bound is for one map shared by all of them. It is the
    best map in hindsight, fitted to these very vectors: no trained map can be better on them. Raises `ValueError` if
    nothing was corrupted.
    """
    dim = clean.shape[-1]
    if rank is not None and not 0 <= rank <= dim:
        raise ValueError(f"rank {rank} is out of range: 0 to the head size, {dim}")
    x = corrupted.reshape(-1, dim).double()
    error = x - clean.reshape(-1, dim).double()
    total = error.square().sum()
    if total == 0:
        raise ValueError("the corrupted vectors are the clean ones: there is no error to bound")
    # with X = Q R the fitted part of the error is Q Q^T error; its rank-r share is that of the top singular values
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    fitted = u[:, _spanned(s, len(x))].T @ error
    explained = torch.linalg.svdvals(fitted).square()[:rank].sum()
    return float((1 - explained / total).clamp_min(0).sqrt())


def _spanned(singular_values: torch.Tensor, rows: int) -> torch.Tensor:
    """Which singular vectors the rows of a matrix really span; the others are arbitrary."""
    return singular_values > singular_values.max() * torch.finfo(singular_values.dtype).eps * rows


def best_linear_map(clean: torch.Tensor, corrupted: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    """The M [d, d] of `rank` (None: full) that makes ||X_corr (I + M) - X|| least: the map that attains `linear_bound`.

    clean, corrupted [..., d] as there; weight rows by scaling both. In double precision.
    """
    dim = clean.shape[-1]
    x = corrupted.reshape(-1, dim).double()
    error = x - clean.reshape(-1, dim).double()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    fitted = u.T @ error
    right = torch.linalg.svd(fitted, full_matrices=False).Vh[:rank]
    inverse = torch.where(_spanned(s, len(x)), 1 / s, 0.0)
    return -vh.T @ (inverse[:, None] * fitted @ right.T @ right)
