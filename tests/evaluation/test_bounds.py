"""Bounds on what a linear repair can leave of an error."""

from __future__ import annotations

import pytest
import torch

from cachemedic.evaluation.bounds import best_linear_map, linear_bound, rank_floor


def vectors(rows: int = 4000, dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -2, dim)
    clean = torch.randn(rows, dim, generator=generator) * spectrum
    return clean, torch.randn(rows, dim, generator=generator)


def rho(clean, corrupted, matrix):
    left = corrupted + corrupted @ matrix - clean
    return float(left.norm() / (corrupted - clean).norm())


def test_no_map_of_a_rank_beats_the_bound():
    clean, noise = vectors()
    corrupted = clean + 0.5 * noise
    generator = torch.Generator().manual_seed(1)
    for rank in (1, 4, 16):
        bound = linear_bound(clean, corrupted, rank)
        for _ in range(20):
            matrix = torch.randn(16, rank, generator=generator) @ torch.randn(rank, 16, generator=generator) / 16
            assert rho(clean, corrupted, matrix) >= bound


@pytest.mark.parametrize("kept", [0, 3])
def test_directions_that_were_erased_explain_nothing(kept):
    clean, _ = vectors(rows=60, dim=8)
    corrupted = clean.clone()
    corrupted[:, kept:] = 0
    best = best_linear_map(clean, corrupted).float() if kept else torch.zeros(8, 8)
    assert linear_bound(clean, corrupted) == pytest.approx(rho(clean, corrupted, best), abs=1e-5)


def test_the_bound_is_reached_by_least_squares():
    clean, noise = vectors()
    corrupted = clean + 0.5 * noise
    best = torch.linalg.lstsq(corrupted, clean - corrupted).solution
    assert rho(clean, corrupted, best) == pytest.approx(linear_bound(clean, corrupted), abs=1e-4)
    u, s, v = torch.linalg.svd(corrupted @ best, full_matrices=False)
    of_rank_4 = best @ v[:4].T @ v[:4]  # reduced-rank regression: project the fit onto its top directions
    assert rho(clean, corrupted, of_rank_4) == pytest.approx(linear_bound(clean, corrupted, 4), abs=1e-4)


def test_isotropic_noise_meets_the_rank_floor():
    clean, noise = vectors(rows=20000)
    corrupted = 100 * noise + clean  # noise so strong that nothing else matters
    for rank in (4, 8):
        assert linear_bound(clean, corrupted, rank) == pytest.approx(rank_floor(rank, 16), abs=0.01)


def test_bounds_fall_with_rank_and_start_at_one():
    clean, noise = vectors()
    corrupted = clean + noise
    found = [linear_bound(clean, corrupted, rank) for rank in range(17)]
    assert found[0] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(found, found[1:], strict=False))
    assert found[-1] == pytest.approx(linear_bound(clean, corrupted))


def test_bad_input_is_named():
    clean, _ = vectors()
    with pytest.raises(ValueError, match="rank 17"):
        linear_bound(clean, clean + 1, 17)
    with pytest.raises(ValueError, match="no error"):
        linear_bound(clean, clean)
    with pytest.raises(ValueError, match="rank 33 is out of range"):
        rank_floor(33, 32)


@pytest.mark.parametrize("rank", [1, 4, None])
def test_the_best_map_attains_the_bound(rank):
    clean, noise = vectors()
    corrupted = clean + 0.5 * noise
    best = best_linear_map(clean, corrupted, rank)
    assert torch.linalg.matrix_rank(best) == (16 if rank is None else rank)
    assert rho(clean.double(), corrupted.double(), best) == pytest.approx(
        linear_bound(clean, corrupted, rank), abs=1e-9
    )


def test_the_best_map_of_a_cache_without_full_rank_is_finite():
    clean, noise = vectors()
    clean[:, -1] = noise[:, -1] = 0
    best = best_linear_map(clean, clean + noise)
    assert best.isfinite().all()
    assert rho(clean.double(), (clean + noise).double(), best) == pytest.approx(
        linear_bound(clean, clean + noise), rel=1e-3
    )
