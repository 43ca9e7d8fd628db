"""Specifications and the events drawn from them."""

import json
import math

import pytest
import torch

from cachemedic.corruption.spec import CorruptionSpec, draw_event

L, G, T = SHAPE = (2, 3, 10)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_masks_on_three_axes():
    event = draw_event(
        CorruptionSpec("gaussian", parameter=1.0, layers=[1], heads=[0, 2], time=("window", 2, 5)), SHAPE, seeded()
    )
    assert event.layers.tolist() == [False, True]
    assert event.heads.tolist() == [[True, False, True]] * L
    assert event.time.nonzero().flatten().tolist() == [2, 3, 4]
    assert (event.n_layers, event.n_heads, event.n_positions) == (1, 2, 3)
    old = draw_event(CorruptionSpec("gaussian", parameter=1.0, time=("old_only", 4)), SHAPE, seeded())
    assert old.time.tolist() == [True] * 6 + [False] * 4
    everything = draw_event(CorruptionSpec("gaussian", parameter=1.0, layers=1.0, heads=1.0), SHAPE, seeded())
    assert (everything.n_layers, everything.n_heads, everything.n_positions) == (L, L * G, T)


def test_bernoulli_masks_and_share_hit_the_wanted_share():
    generator = seeded()
    shape = (40, 20, 200)
    spec = CorruptionSpec("gaussian", parameter=1.0, layers=0.3, heads=0.6, share=0.25)
    events = [draw_event(spec, shape, generator) for _ in range(20)]
    assert torch.stack([e.layers for e in events]).float().mean() == pytest.approx(0.3, abs=0.05)
    assert torch.stack([e.heads for e in events]).float().mean() == pytest.approx(0.6, abs=0.02)
    assert torch.stack([e.time for e in events]).float().mean() == pytest.approx(0.25, abs=0.03)


def test_specifications_share_their_random_draws():
    weak, strong = (CorruptionSpec("quant_noise", parameter=1, share=share, heads=share) for share in (0.3, 0.6))
    generators = seeded(), seeded()
    for _ in range(5):
        few, many = draw_event(weak, SHAPE, generators[0]), draw_event(strong, SHAPE, generators[1])
        assert not (few.time & ~many.time).any()
        assert not (few.heads & ~many.heads).any()


def test_the_record_is_strict_json():
    spec = CorruptionSpec("quant_noise", parameter=2, share=0.5)
    record = json.loads(json.dumps(draw_event(spec, SHAPE, seeded()).as_record(), allow_nan=False))
    assert record["type"] == "quant_noise"
    assert record["severity"] is None
    assert record["n_heads"] == L * G
    assert set(record) == {"type", "severity", "parameter", "share", "n_layers", "n_heads", "n_positions"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "gausian", "parameter": 1.0}, "did you mean 'gaussian'"),
        ({"type": "gaussian"}, "exactly one of severity and parameter"),
        ({"type": "gaussian", "severity": 0.5, "parameter": 1.0}, "exactly one"),
        ({"type": "none", "severity": 0.5}, "takes no severity"),
        ({"type": "gaussian", "severity": -0.1}, "severity -0.1"),
        ({"type": "gaussian", "severity": math.nan}, "severity nan"),
        ({"type": "gaussian", "parameter": math.inf}, "0 upwards"),
        ({"type": "dropout_zero", "parameter": 1.5}, "1.5 of dropout_zero is out of range.* 0 to 1"),
        ({"type": "quant_noise", "parameter": 2.5}, "whole number from 1 to 16"),
        ({"type": "quant_noise", "parameter": 0}, "whole number from 1 to 16"),
        ({"type": "contiguous_overwrite", "parameter": -1}, "-1"),
        ({"type": "gaussian", "parameter": 1.0, "share": 1.2}, "share 1.2"),
        ({"type": "gaussian", "parameter": 1.0, "layers": []}, "non-empty list"),
        ({"type": "gaussian", "parameter": 1.0, "layers": 3}, "layers=3"),
        ({"type": "gaussian", "parameter": 1.0, "heads": [-1]}, r"heads=\[-1\]"),
        ({"type": "gaussian", "parameter": 1.0, "heads": 1.5}, "heads=1.5"),
        ({"type": "gaussian", "parameter": 1.0, "time": "recent"}, "time='recent'"),
        ({"type": "gaussian", "parameter": 1.0, "time": ("window", 5, 5)}, "0 <= a < b"),
    ],
)
def test_bad_specifications_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CorruptionSpec(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [L]}, f"layer {L} is out of range"),
        ({"heads": [0, 7]}, "head 7 is out of range"),
        ({"time": ("old_only", T)}, f"does not fit a cache of {T} positions"),
        ({"time": ("window", 3, T + 1)}, "does not fit"),
    ],
)
def test_masks_that_do_not_fit_the_cache_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw_event(CorruptionSpec("gaussian", parameter=1.0, **options), SHAPE, seeded())
