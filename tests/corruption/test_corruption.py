"""The rule of every corruption type, applied to stacked tensors with one event per sample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemedic.corruption.apply import MIXTURE_WEIGHTS, corrupt
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.corruption.types import CORRUPTIONS, ROTATION_SEED_TEST, ROTATION_SEED_TRAIN, rotation

B, L, G, T, D = 3, 2, 3, 10, 8
SHAPE = (L, G, T)
STRONG = {
    "gaussian": 1.5, "dropout_zero": 0.5, "orthogonal_rotation": 0.7, "bitflip_sparse": 0.3, "quant_noise": 2,
    "contiguous_overwrite": 4,
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored(seed: int = 0, positions: int = T, batch: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    return tuple(torch.randn(batch, L, G, positions, D, generator=generator) for _ in "kv")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.view(integers), b.view(integers))


def apply(spec: CorruptionSpec, seed: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """`stored()` with every sample corrupted by `spec`; sample tensors for single-sample checks are row 0."""
    generator = seeded(seed)
    events = [draw_event(spec, SHAPE, generator) for _ in range(B)]
    return corrupt(*stored(), events, generator, *stored(1), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURE_WEIGHTS)
def test_zero_is_the_identity_bit_for_bit(name, dtype):
    k, v = (x.to(dtype) for x in stored())
    k[0, 0, 0, 0] = torch.tensor([-0.0, 0.0, math.inf, math.nan, 1.0, 2.0, 3.0, 4.0])
    for spec in (
        CorruptionSpec(name, severity=0),
        CorruptionSpec("none"),
        CorruptionSpec(name, parameter=STRONG[name], share=0),
    ):
        k2, v2 = corrupt(k, v, [draw_event(spec, SHAPE, seeded())] * B, seeded())
        assert same_bits(k2, k)
        assert same_bits(v2, v)
        assert k2.data_ptr() != k.data_ptr()
    if CORRUPTIONS[name].low == 0:
        event = draw_event(CorruptionSpec(name, parameter=0.0), SHAPE, seeded())
        assert not event.is_active
        assert all(map(same_bits, corrupt(k, v, [event] * B, seeded()), (k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURE_WEIGHTS)
def test_only_masked_entries_change_and_the_same_seed_gives_the_same_bits(name, dtype):
    k, v, donor_k, donor_v = (x.to(dtype) for x in (*stored(), *stored(1)))
    k_before, v_before = k.clone(), v.clone()
    spec = CorruptionSpec(name, parameter=STRONG[name], layers=0.7, heads=0.6, time=("old_only", 3), share=0.8)

    def run():
        generator = seeded(5)
        events = [draw_event(spec, SHAPE, generator) for _ in range(B)]
        return events, corrupt(k, v, events, generator, donor_k, donor_v)

    events, (k2, v2) = run()
    assert all(map(same_bits, run()[1], (k2, v2)))
    assert same_bits(k, k_before)
    assert same_bits(v, v_before)
    changed = torch.stack([(k2 != k).any(-1), (v2 != v).any(-1)])  # [2, B, L, G, T]
    hit = torch.stack([(e.layers[:, None] & e.heads)[..., None] & e.time for e in events])
    assert hit.any()
    assert not hit.all()
    assert not changed[:, ~hit].any()
    assert changed[:, hit].float().mean() > 0.9
    assert k2.dtype == dtype


def test_samples_of_a_batch_follow_their_own_events():
    k, v = stored(batch=len(MIXTURE_WEIGHTS) + 1)
    donors = stored(1, batch=len(MIXTURE_WEIGHTS) + 1)
    specs = [CorruptionSpec("none"), *(CorruptionSpec(name, parameter=STRONG[name]) for name in MIXTURE_WEIGHTS)]
    events = [draw_event(spec, SHAPE, seeded()) for spec in specs]
    k2, _ = corrupt(k, v, events, seeded(), *donors)
    assert [bool((a != b).any()) for a, b in zip(k2, k, strict=True)] == [False] + [True] * len(MIXTURE_WEIGHTS)
    row = specs.index(next(s for s in specs if s.type == "quant_noise"))
    alone, _ = corrupt(k[row : row + 1], v[row : row + 1], [events[row]], seeded())
    assert same_bits(alone[0], k2[row])


def test_gaussian_noise_is_scaled_by_the_rms_of_each_vector():
    spec, scale = CorruptionSpec("gaussian", parameter=0.5), 10.0
    k, v = (x.repeat(1, 1, 1, 1, 64) * torch.linspace(1, scale, T)[:, None] for x in stored())
    k2, v2 = corrupt(k, v, [draw_event(spec, SHAPE, seeded())] * B, seeded())
    for clean, noisy in ((k, k2), (v, v2)):
        ratio = (noisy - clean).square().mean(-1).sqrt() / clean.square().mean(-1).sqrt()
        assert ratio.mean() == pytest.approx(0.5, rel=0.02)
        assert ratio.min() > 0.4
        assert ratio.max() < 0.6


def test_dropout_zeroes_elements_with_probability_p():
    clean = stored()
    for before, after in zip(clean, apply(CorruptionSpec("dropout_zero", parameter=0.3)), strict=True):
        zero = after == 0
        assert zero.float().mean() == pytest.approx(0.3, abs=0.05)
        assert torch.equal(after[~zero], before[~zero])


def test_rotation_rotates_every_vector_by_one_matrix():
    for seed in (ROTATION_SEED_TRAIN, ROTATION_SEED_TEST):
        k2, v2 = apply(CorruptionSpec("orthogonal_rotation", parameter=0.7), rotation_seed=seed)
        k, v = stored()
        matrix = rotation(seed, D, 0.7).float()
        torch.testing.assert_close(k2, k @ matrix)
        torch.testing.assert_close(v2, v @ matrix)


def test_bitflips_change_sign_or_jump_by_eight_times_the_magnitude():
    k, v = (x.repeat(1, 1, 1, 1, 64) for x in stored())
    k[..., 0] = 1e-5  # below the floor of the magnitude
    event = draw_event(CorruptionSpec("bitflip_sparse", parameter=0.2), SHAPE, seeded())
    for clean, found in zip((k, v), corrupt(k, v, [event] * B, seeded()), strict=True):
        jump = 8 * clean.abs().clamp(min=1e-3)
        kinds = [found == clean, found == -clean, found == clean + jump, found == clean - jump]
        assert torch.stack(kinds).any(0).all()
        shares = [kind.float().mean().item() for kind in kinds]
        assert shares == pytest.approx([0.8, 0.1, 0.05, 0.05], abs=0.01)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantisation_per_head(bits):
    clean = stored()
    for before, after in zip(clean, apply(CorruptionSpec("quant_noise", parameter=bits)), strict=True):
        for x, y in zip(before.flatten(0, 2), after.flatten(0, 2), strict=True):  # [T, D] of one head
            if bits == 1:
                torch.testing.assert_close(y, x.sign() * x.abs().mean())
                continue
            step = x.abs().max() / (2 ** (bits - 1) - 1)
            assert (y - x).abs().max() <= step / 2 * 1.0001
            assert len((y / step).round().unique()) <= 2**bits - 1
            torch.testing.assert_close(y, (y / step).round() * step)


def test_the_quantisation_scale_ignores_what_is_not_hit():
    k, v = stored()
    k[:, :, :, 0] = math.nan  # left padding of a fully masked row may hold anything
    spec = CorruptionSpec("quant_noise", parameter=3, time=("window", 1, T))
    k2, _ = corrupt(k, v, [draw_event(spec, SHAPE, seeded())] * B, seeded())
    expected, _ = corrupt(
        k[..., 1:, :],
        v[..., 1:, :],
        [draw_event(CorruptionSpec("quant_noise", parameter=3), (L, G, T - 1), seeded())] * B,
        seeded(),
    )
    assert torch.equal(k2[..., 1:, :], expected)


def test_overwrite_takes_a_window_from_the_donor():
    (k, v), (donor_k, donor_v) = stored(), stored(1, positions=T + 2)
    starts = set()
    for seed in range(60):
        event = draw_event(CorruptionSpec("contiguous_overwrite", parameter=4), SHAPE, seeded(seed))
        k2, v2 = corrupt(k, v, [event] * B, seeded(), donor_k, donor_v)
        (positions,) = event.time.nonzero(as_tuple=True)
        a, b = int(positions[0]), int(positions[-1]) + 1
        assert b - a == event.n_positions == event.parameter == 4
        for clean, found, donor in ((k, k2, donor_k), (v, v2, donor_v)):
            assert torch.equal(found, torch.cat([clean[..., :a, :], donor[..., a:b, :], clean[..., b:, :]], dim=3))
        starts.add(a)
    assert starts == set(range(T - 4 + 1))
    inside = draw_event(CorruptionSpec("contiguous_overwrite", parameter=8, time=("window", 2, 5)), SHAPE, seeded())
    assert inside.time.nonzero().flatten().tolist() == [2, 3, 4]


@settings(max_examples=30)
@given(st.integers(0, 20), st.sampled_from([1, 2, 3, 5, 16, 32, 33]), st.floats(0, 1))
def test_rotations_stay_on_the_rotation_group(seed, dim, theta):
    matrix = rotation(seed, dim, theta)
    identity = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, atol=1e-9, rtol=0)
    assert torch.linalg.det(matrix).item() == pytest.approx(1.0)
    torch.testing.assert_close(
        rotation(seed, dim, theta / 2) @ rotation(seed, dim, theta / 2), matrix, atol=1e-9, rtol=0
    )


def test_rotation_endpoints_and_seeds():
    assert torch.equal(rotation(0, 16, 0.0), torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(rotation(0, 16, 1.0 - 1e-9), rotation(0, 16, 1.0), atol=1e-6, rtol=0)
    angles = [torch.linalg.matrix_norm(rotation(0, 16, t) - torch.eye(16)).item() for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert angles == sorted(angles)
    assert angles[1] > 0
    assert not torch.allclose(rotation(ROTATION_SEED_TRAIN, 16, 1.0), rotation(ROTATION_SEED_TEST, 16, 1.0))


def test_events_of_another_length_are_aligned_at_the_newest_position():
    k, v = stored()
    for positions in (T - 4, T + 5):
        event = draw_event(CorruptionSpec("gaussian", parameter=1.0, time=("old_only", 2)), (L, G, positions), seeded())
        k2, _ = corrupt(k, v, [event] * B, seeded())
        hit = (k2 != k).any(-1)[0, 0, 0]
        assert hit.tolist() == [T - min(T, positions) <= t < T - 2 for t in range(T)]


def test_donors_that_do_not_fit_are_refused():
    k, v = stored()
    event = draw_event(CorruptionSpec("contiguous_overwrite", parameter=2), SHAPE, seeded())
    with pytest.raises(ValueError, match="needs a donor"):
        corrupt(k, v, [event] * B, seeded())
    with pytest.raises(ValueError, match=f"the donor holds {T - 1} positions"):
        corrupt(k, v, [event] * B, seeded(), *stored(1, positions=T - 1))
    with pytest.raises(ValueError, match="a donor for"):
        corrupt(k, v, [event] * B, seeded(), *stored(1, batch=B + 1))
    with pytest.raises(ValueError, match=f"length {T + 1} is out of range"):
        draw_event(CorruptionSpec("contiguous_overwrite", parameter=T + 1), SHAPE, seeded())


def test_events_that_do_not_fit_are_refused():
    k, v = stored()
    event = draw_event(CorruptionSpec("gaussian", parameter=1.0), (L, G + 1, T), seeded())
    with pytest.raises(ValueError, match="does not fit a cache"):
        corrupt(k, v, [event] * B, seeded())
    with pytest.raises(ValueError, match="3 samples need as many events, got 1"):
        corrupt(k, v, [event], seeded())
