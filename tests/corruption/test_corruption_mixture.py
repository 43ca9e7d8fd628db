"""The training mixture and the severity axis, over a stand-in for the calibrated map."""

from collections import Counter

import pytest
import torch

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption import apply, spec
from cachemedic.corruption.apply import MIXTURE_WEIGHTS, Mixture, corrupt
from cachemedic.corruption.spec import CorruptionSpec, draw_event

SHAPE = (4, 2, 32)
REACH = {"gaussian": 0.3}
AT_FULL_SEVERITY = {
    "gaussian": 2.0, "dropout_zero": 0.8, "orthogonal_rotation": 1.0, "bitflip_sparse": 0.1, "quant_noise": 1,
    "contiguous_overwrite": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """A map linear in severity; yields the arguments it was asked with."""
    asked = []

    def resolve(name, severity, base, shape, by_share):
        asked.append((name, severity, base, shape))
        assert severity <= REACH.get(name, 1.0)
        assert by_share == (name == "quant_noise")
        return (1, severity) if by_share else (AT_FULL_SEVERITY[name] * severity, 1.0)

    stand_in = object.__new__(SeverityMap)
    stand_in.resolve, stand_in.reach = resolve, lambda name, base, shape: REACH.get(name, 1.0)
    for module in (spec, apply):
        monkeypatch.setattr(module, "shipped_map", lambda: stand_in)
    return asked


def draw(mixture: Mixture, n: int = 2000, seed: int = 0):
    return mixture.draw(torch.Generator().manual_seed(seed), n, SHAPE)


def test_severity_is_resolved_by_the_map(calls):
    generator = torch.Generator().manual_seed(0)
    event = draw_event(CorruptionSpec("gaussian", severity=0.25, base="embedded-gpt2"), SHAPE, generator)
    assert (event.severity, event.parameter, event.share) == (0.25, 0.5, 1.0)
    assert calls == [("gaussian", 0.25, "embedded-gpt2", SHAPE)]
    quantised = draw_event(CorruptionSpec("quant_noise", severity=0.5), SHAPE, generator)
    assert (quantised.parameter, quantised.share) == (1.0, 0.5)
    assert 0 < quantised.n_positions < SHAPE[2]


@pytest.mark.parametrize(("positions", "length"), [(128, 32), (32, 8), (2, 1), (1, 1)])
def test_calibrated_overwrite_lengths_scale_with_the_cache(positions, length):
    spec = CorruptionSpec("contiguous_overwrite", severity=0.5)
    event = draw_event(spec, (4, 2, positions), torch.Generator().manual_seed(0))
    assert event.n_positions == event.parameter == length


def test_the_default_mixture():
    events = draw(Mixture())
    kinds = Counter(event.type for event in events)
    assert kinds.pop("none") / len(events) == pytest.approx(0.2, abs=0.03)
    corrupted = sum(kinds.values())
    assert {name: n / corrupted for name, n in kinds.items()} == pytest.approx(MIXTURE_WEIGHTS, abs=0.03)
    by_severity = Counter(event.severity for event in events if event.type not in ("none", "gaussian"))
    assert set(by_severity) == {0.1, 0.25, 0.5, 1.0}
    assert min(by_severity.values()) / by_severity.total() > 0.2
    assert {event.severity for event in events if event.type == "gaussian"} == {0.1, 0.25, 0.3}
    continuous = [e for e in events if e.type not in ("none", "quant_noise", "contiguous_overwrite")]
    full = [event.n_heads == 8 and event.n_positions == 32 for event in continuous]
    assert sum(full) / len(full) == pytest.approx(0.5, abs=0.08)
    masked = [event for event, is_full in zip(continuous, full, strict=True) if not is_full]
    assert all(event.layers.all() for event in masked)
    assert sum(event.n_heads for event in masked) / (8 * len(masked)) == pytest.approx(0.625, abs=0.06)
    newest_spared = sum(not event.time[-1] for event in masked) / len(masked)
    assert 0.3 < newest_spared < 0.75


def test_the_same_seed_draws_the_same_events():
    first, second = ([e.as_record() for e in draw(Mixture(), 50)] for _ in range(2))
    assert first == second
    assert first != [e.as_record() for e in draw(Mixture(), 50, seed=1)]


def test_mixtures_of_one_seed_share_the_draws_of_severity_and_masks():
    everything, others = draw(Mixture(), 300), draw(Mixture().without("gaussian"), 300)
    pairs = [(a, b) for a, b in zip(everything, others, strict=True) if a.type == b.type != "none"]
    assert len(pairs) > 50
    assert all(a.as_record() == b.as_record() and torch.equal(a.heads, b.heads) for a, b in pairs)


def test_leaving_a_type_out_renormalises():
    mixture = Mixture().without("gaussian")
    assert sum(mixture.weights.values()) == pytest.approx(1.0)
    assert mixture.weights["dropout_zero"] == pytest.approx(0.2 / 0.75)
    assert "gaussian" not in {event.type for event in draw(mixture)}
    assert {event.type for event in draw(Mixture({"quant_noise": 3.0}, clean_share=0.0), 50)} == {"quant_noise"}


@pytest.mark.parametrize("positions", [1, 2, 3, 17])
def test_every_event_of_a_mixture_can_be_applied(positions):
    n, shape = 200, (2, 2, positions)
    generator = torch.Generator().manual_seed(0)
    k, v, donor_k, donor_v = (torch.randn(n, *shape, 4, generator=generator) for _ in range(4))
    events = Mixture().draw(generator, n, shape)
    assert all(torch.isfinite(x).all() for x in corrupt(k, v, events, generator, donor_k, donor_v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"gausian": 1.0}}, "did you mean 'gaussian'"),
        ({"weights": {"none": 1.0}}, "unknown corruption type 'none'"),
        ({"weights": {"gaussian": -1.0}}, "weight -1.0 of gaussian"),
        ({"weights": {"gaussian": 0.0}}, "at least one type of positive weight"),
        ({"weights": {}}, "at least one type of positive weight"),
        ({"clean_share": 1.5}, "clean_share 1.5"),
        ({"severities": ()}, "at least one number above 0"),
        ({"severities": (0.0, 0.5)}, "at least one number above 0"),
    ],
)
def test_bad_mixtures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**options)


def test_leaving_out_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="did you mean 'quant_noise'"):
        Mixture().without("quant_nois")
