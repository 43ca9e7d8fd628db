"""Baselines: what each leaves alone, what it undoes, and that the blind ones need no truth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.defenses.clean_ranges import CacheStatistics
from cachemedic.defenses.heuristics import Dropout, Masking, RangeRestriction, Smoothing, Truth, blind_defences, oracles

N, L, G, T, D = 5, 2, 3, 12, 4
PADS = torch.tensor([0, 3, 0, 1, 0])
VALID = torch.arange(T) >= PADS[:, None]


def clean_cache(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache whose first position is a sink: far from all others."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(N, L, G, T, D, generator=generator) for _ in "kv")
    for x in (k, v):
        x[torch.arange(N), :, :, PADS] += 50.0
    return k, v


def corrupted_cache(type: str = "bitflip_sparse", parameter: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spec = CorruptionSpec(type, parameter=parameter, heads=0.7, time=("window", 4, 9))
    events = [draw_event(spec, (L, G, T), generator) for _ in range(N)]
    return corrupt(*clean_cache(), events, generator)


STATISTICS = CacheStatistics.measure(*clean_cache(), VALID)


def truth() -> Truth:
    clean, hit = clean_cache(), corrupted_cache()
    return Truth(*clean, damaged=(clean[0] != hit[0]).any(-1) | (clean[1] != hit[1]).any(-1))


def test_every_defence_leaves_its_input_alone_and_keeps_the_shapes() -> None:
    k, v = corrupted_cache()
    before = k.clone(), v.clone()
    outcomes = [defence(k, v, VALID) for defence in blind_defences(STATISTICS).values()]
    outcomes += [oracle(k, v, VALID, truth()) for oracle in oracles(STATISTICS).values()]
    for outcome in outcomes:
        assert outcome.k.shape == k.shape
        assert outcome.v.shape == v.shape
        assert outcome.k.isfinite().all()
        assert outcome.keep is None or (outcome.keep.shape == VALID.shape and outcome.keep.dtype == torch.bool)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


def test_statistics_keep_the_first_position_apart_and_ignore_padding() -> None:
    k, v = clean_cache()
    others = torch.cat([k[i, :, :, PADS[i] + 1 :] for i in range(N)], dim=2)
    first = torch.stack([k[i, :, :, PADS[i]] for i in range(N)], dim=2)
    torch.testing.assert_close(STATISTICS.k[0].high[:, :, 0], first.amax(2))
    torch.testing.assert_close(STATISTICS.k[1].low[:, :, 0], others.amin(2))
    torch.testing.assert_close(STATISTICS.k[1].mean[:, :, 0], others.mean(2))
    torch.testing.assert_close(STATISTICS.k[1].std[:, :, 0], others.std(2, correction=0))
    torch.testing.assert_close(STATISTICS.k[1].norm[:, :, 0, 0], others.norm(dim=-1).amax(2))


def test_statistics_need_two_positions() -> None:
    k, v = clean_cache()
    with pytest.raises(ValueError, match="at least 2 positions, got 1"):
        CacheStatistics.measure(k[..., :1, :], v[..., :1, :], VALID[:, :1])


@given(beta=st.floats(0, 0.99), pads=st.lists(st.integers(0, T - 1), min_size=N, max_size=N), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_smoothing_is_the_plain_recursion(beta: float, pads: list[int], seed: int) -> None:
    valid = torch.arange(T) >= torch.tensor(pads)[:, None]
    k, v = clean_cache(seed)
    smoothed = Smoothing(beta)(k, v, valid)
    for x, result in ((k, smoothed.k), (v, smoothed.v)):
        for row, pad in enumerate(pads):
            y = x[row, :, :, pad]
            for t in range(pad, T):
                y = y if t == pad else beta * y + (1 - beta) * x[row, :, :, t]
                torch.testing.assert_close(result[row, :, :, t], y, rtol=1e-4, atol=1e-3)


def test_range_restriction_is_the_identity_on_what_it_was_calibrated_on_and_caps_all_else() -> None:
    k, v = clean_cache()
    same = RangeRestriction(STATISTICS)(k, v, VALID)
    assert torch.equal(same.k[:, :, :, 3:], k[:, :, :, 3:])  # before, some positions are padding
    wild = RangeRestriction(STATISTICS)(k * 100, v * 100, VALID)
    first, others = STATISTICS.k
    row = wild.k[0]  # no padding
    assert ((row[:, :, :1] >= first.low) & (row[:, :, :1] <= first.high)).all()
    assert ((row[:, :, 1:] >= others.low) & (row[:, :, 1:] <= others.high)).all()


def test_clip_renormalise_never_passes_the_largest_clean_norm() -> None:
    k, v = clean_cache()
    defence = blind_defences(STATISTICS)["clip_renormalise"]
    wild = defence(k * 100, v * 100, VALID)
    assert (wild.k[0, :, :, 1:].norm(dim=-1) <= STATISTICS.k[1].norm[..., 0] * 1.0001).all()
    mild = defence(k, v, VALID)
    torch.testing.assert_close(mild.v[0].norm(dim=-1), v[0].norm(dim=-1))
    assert defence(torch.zeros_like(k), v, VALID).k.isfinite().all()


def test_masking_drops_damaged_positions_and_no_clean_one() -> None:
    k, v = clean_cache()
    assert Masking(STATISTICS)(k, v, VALID).keep[VALID].all()
    k[2, :, :, 7] *= 100
    keep = Masking(STATISTICS)(k, v, VALID).keep
    assert not keep[2, 7]
    assert keep[VALID].sum() == VALID.sum() - 1


def test_dropout_is_blind_reproducible_and_drops_the_asked_share() -> None:
    valid = torch.ones(40, 100, dtype=torch.bool)
    cache = torch.zeros(40, 1, 1, 100, 2)
    keep = Dropout(0.1)(cache, cache, valid).keep
    assert torch.equal(keep, Dropout(0.1)(cache, cache, valid).keep)
    assert float((~keep).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_oracles_touch_damaged_entries_only() -> None:
    (k, v), known = corrupted_cache(), truth()
    assert known.damaged.any()
    assert not known.damaged.all()
    for outcome in (oracle(k, v, VALID, known) for oracle in oracles(STATISTICS).values()):
        assert torch.equal(outcome.k[~known.damaged], k[~known.damaged])
        assert torch.equal(outcome.v[~known.damaged], v[~known.damaged])


def test_references_know_the_truth() -> None:
    (k, v), known = corrupted_cache(), truth()
    recomputed = oracles(STATISTICS)["recompute"](k, v, VALID, known)
    assert torch.equal(recomputed.k, known.k)
    assert torch.equal(recomputed.v, known.v)
    erased = oracles(STATISTICS)["erase_damaged"](k, v, VALID, known)
    assert torch.equal(erased.keep, ~known.damaged.any(2).any(1))
