"""Baselines: what each leaves alone, and what it undoes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemedic.corruption.apply import corrupt
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.defenses.by_name import create_defense
from cachemedic.defenses.clean_ranges import CacheStatistics
from cachemedic.defenses.defense import CachedTokens, Defense
from cachemedic.defenses.heuristics import (
    BLIND,
    ORACLES,
    ClipRenormalise,
    Dropout,
    Masking,
    RangeRestriction,
    Smoothing,
    damaged_vectors,
    oracles,
)
from cachemedic.defenses.registry import DEFENSES, Calibration, register_defense

N, L, G, T, D = 5, 2, 3, 12, 4
PADS = torch.tensor([0, 3, 0, 1, 0])
VALID = torch.arange(T) >= PADS[:, None]


def tokens(k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor = VALID) -> CachedTokens:
    return CachedTokens.behind_padding(k, v, torch.zeros(valid.shape, dtype=torch.long), valid)


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


CLEAN, DAMAGED = tokens(*clean_cache()), tokens(*corrupted_cache())
HIT = damaged_vectors(CLEAN, DAMAGED)
# shape and model are not needed by what is tested here
CALIBRATION = Calibration(None, CLEAN)  # type: ignore[arg-type]
STATISTICS = CALIBRATION.statistics


def through(defense: Defense, damaged: CachedTokens = DAMAGED) -> CachedTokens:
    return defense.read(damaged, defense.write(CLEAN))


@pytest.mark.parametrize("name", [*BLIND, *ORACLES])
def test_every_defense_leaves_its_input_alone_and_keeps_the_shapes(name: str) -> None:
    before = DAMAGED.k.clone(), DAMAGED.v.clone()
    outcome = through(create_defense(name, CALIBRATION))
    assert outcome.k.shape == DAMAGED.k.shape
    assert outcome.v.shape == DAMAGED.v.shape
    assert outcome.k.isfinite().all()
    assert outcome.readable is None or (outcome.readable.shape == VALID.shape and outcome.readable.dtype == torch.bool)
    assert torch.equal(DAMAGED.k, before[0])
    assert torch.equal(DAMAGED.v, before[1])


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
        CacheStatistics.of(tokens(k[..., :1, :], v[..., :1, :], VALID[:, :1]))


@given(beta=st.floats(0, 0.99), pads=st.lists(st.integers(0, T - 1), min_size=N, max_size=N), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_smoothing_is_the_plain_recursion(beta: float, pads: list[int], seed: int) -> None:
    valid = torch.arange(T) >= torch.tensor(pads)[:, None]
    k, v = clean_cache(seed)
    smoothed = Smoothing(beta).read(tokens(k, v, valid), None)
    for x, result in ((k, smoothed.k), (v, smoothed.v)):
        for row, pad in enumerate(pads):
            y = x[row, :, :, pad]
            for t in range(pad, T):
                y = y if t == pad else beta * y + (1 - beta) * x[row, :, :, t]
                torch.testing.assert_close(result[row, :, :, t], y, rtol=1e-4, atol=1e-3)


def test_range_restriction_is_the_identity_on_what_it_was_calibrated_on_and_caps_all_else() -> None:
    k, v = clean_cache()
    same = RangeRestriction(STATISTICS).read(tokens(k, v), None)
    assert torch.equal(same.k[:, :, :, 3:], k[:, :, :, 3:])  # before, some positions are padding
    wild = RangeRestriction(STATISTICS).read(tokens(k * 100, v * 100), None)
    first, others = STATISTICS.k
    row = wild.k[0]  # no padding
    assert ((row[:, :, :1] >= first.low) & (row[:, :, :1] <= first.high)).all()
    assert ((row[:, :, 1:] >= others.low) & (row[:, :, 1:] <= others.high)).all()


def test_clip_renormalise_never_passes_the_largest_clean_norm() -> None:
    k, v = clean_cache()
    defense = ClipRenormalise(STATISTICS)
    wild = defense.read(tokens(k * 100, v * 100), None)
    assert (wild.k[0, :, :, 1:].norm(dim=-1) <= STATISTICS.k[1].norm[..., 0] * 1.0001).all()
    mild = defense.read(tokens(k, v), None)
    torch.testing.assert_close(mild.v[0].norm(dim=-1), v[0].norm(dim=-1))
    assert defense.read(tokens(torch.zeros_like(k), v), None).k.isfinite().all()


def test_masking_drops_damaged_positions_and_no_clean_one() -> None:
    k, v = clean_cache()
    assert Masking(STATISTICS).read(tokens(k, v), None).readable[VALID].all()
    k[2, :, :, 7] *= 100
    readable = Masking(STATISTICS).read(tokens(k, v), None).readable
    assert not readable[2, 7]
    assert readable[VALID].sum() == VALID.sum() - 1


def test_dropout_is_blind_reproducible_and_drops_the_asked_share() -> None:
    valid = torch.ones(40, 100, dtype=torch.bool)
    cache = torch.zeros(40, 1, 1, 100, 2)
    readable = Dropout(0.1).read(tokens(cache, cache, valid), None).readable
    assert torch.equal(readable, Dropout(0.1).read(tokens(cache, cache, valid), None).readable)
    assert float((~readable).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_oracles_touch_damaged_entries_only() -> None:
    assert HIT.any()
    assert not HIT.all()
    for oracle in oracles(CALIBRATION).values():
        outcome = through(oracle)
        assert torch.equal(outcome.k[~HIT], DAMAGED.k[~HIT])
        assert torch.equal(outcome.v[~HIT], DAMAGED.v[~HIT])


def test_references_read_the_clean_cache() -> None:
    recomputed = through(oracles(CALIBRATION)["prefill"])
    assert torch.equal(recomputed.k, CLEAN.k)
    assert torch.equal(recomputed.v, CLEAN.v)
    erased = through(oracles(CALIBRATION)["erase_damaged"])
    assert erased.readable is not None
    assert torch.equal(erased.readable, ~HIT.any(2).any(1))


@pytest.fixture
def _own_defenses():
    """The defenses of a test are gone after it."""
    shipped = set(DEFENSES)
    yield
    for name in set(DEFENSES) - shipped:
        DEFENSES.remove(name)


@pytest.mark.usefixtures("_own_defenses")
def test_a_defense_registers_by_name_from_any_module() -> None:
    @register_defense("zero values")
    class ZeroValues(Defense):
        def read(self, damaged: CachedTokens, kept: None) -> CachedTokens:
            return replace(damaged, v=torch.zeros_like(damaged.v))

    @register_defense("clip twice")
    def clip_twice(calibration: Calibration) -> Defense:
        return ClipRenormalise(calibration.statistics, width=2.0)

    assert not through(create_defense("zero values", CALIBRATION)).v.any()
    assert create_defense("clip twice", CALIBRATION).width == 2.0
    register_defense("clip twice")(clip_twice)  # the same definition again, as when a notebook cell is run twice
    with pytest.raises(ValueError, match="defense 'none' is cachemedic.defenses.heuristics.NoDefense already"):
        register_defense("none")(ZeroValues)
    with pytest.raises(ValueError, match="unknown defense 'zero value': did you mean 'zero values'"):
        create_defense("zero value", CALIBRATION)


def test_a_defense_that_overrides_nothing_is_free_and_reads_the_cache_as_it_is() -> None:
    defense = Defense()
    assert through(defense) is DAMAGED
    assert (defense.bytes_per_token, defense.fixed_bytes, defense.prefill_share, defense.runs) == (0, 0, 0, 1)
