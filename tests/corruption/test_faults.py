"""Real faults in the corruption machinery; pages and quantisation against slow references."""

import math

import numpy as np
import pytest
import torch
from tiny import DOCUMENTS, tiny_model, tiny_tokenizer

from cachemedic.corruption.apply import Mixture, corrupt, corrupt_cache
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.corruption.storage_faults import FAULT_GRID, KIVI_GROUPS, PAGE
from cachemedic.corruption.types import CORRUPTIONS
from cachemedic.data.task_data import score
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.evaluation.decoding import clean_pass, decode_logits, tokens_of
from cachemedic.evaluation.evaluate import evaluate
from cachemedic.models.cache import stack_cache, unstack_cache

B, L, G, T, D = 3, 2, 2, 40, 8  # two whole pages and a short one
SHAPE = (L, G, T)
INTEGERS = {2: torch.int16, 4: torch.int32}
FAULT_TYPES = [name for name, known in CORRUPTIONS.items() if not known.calibration]
STRONG = {name: 0.01 if name.startswith("bitflip") else 0.5 for name in FAULT_TYPES} | {
    name: 2 for name in FAULT_TYPES if name.startswith("kivi")
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored(seed: int = 0, positions: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    return tuple(torch.randn(B, L, G, positions, D, generator=generator) for _ in "kv")


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGERS[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def apply(spec: CorruptionSpec, seed: int = 0, positions: int = T):
    """The events and the corrupted `stored()`, with donors."""
    generator = seeded(seed)
    events = [draw_event(spec, (L, G, positions), generator) for _ in range(B)]
    return events, corrupt(*stored(0, positions), events, generator, *stored(1, positions))


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "share", "n_pages"), [(64, 0.5, 2), (64, 0.01, 1), (64, 1.0, 4), (40, 1.0, 3)])
def test_swapped_pages_are_the_donors_whole_pages_at_the_same_positions(positions, share, n_pages):
    seen = set()
    for seed in range(20):
        events, results = apply(CorruptionSpec("page_swap", parameter=share), seed, positions)
        for row, event in enumerate(events):
            pages = [page.all().item() for page in event.time.split(PAGE)]
            assert sum(pages) == n_pages
            assert [page.any().item() for page in event.time.split(PAGE)] == pages
            seen |= {i for i, page in enumerate(pages) if page}
            for clean, donor, found in zip(stored(0, positions), stored(1, positions), results, strict=True):
                for i, page in enumerate(pages):
                    at = slice(i * PAGE, (i + 1) * PAGE)
                    assert same_bits(found[row, :, :, at], (donor if page else clean)[row, :, :, at])
    assert seen == set(range(math.ceil(positions / PAGE)))


@pytest.mark.parametrize("positions", [64, 40, 33])
def test_stale_pages_are_whole_pages_of_the_donor_at_other_positions(positions):
    offsets = set()
    for seed in range(20):
        events, results = apply(CorruptionSpec("stale_page", parameter=0.5), seed, positions)
        for row, event in enumerate(events):
            at_offsets = []
            for clean, donor, found in zip(stored(0, positions), stored(1, positions), results, strict=True):
                hit = event.time
                assert same_bits(found[row, :, :, ~hit], clean[row, :, :, ~hit])
                for page in range(math.ceil(positions / PAGE)):
                    size = min(PAGE, positions - page * PAGE)
                    if not hit[page * PAGE]:
                        continue
                    here = found[row, :, :, page * PAGE : page * PAGE + size]
                    sources = [
                        other
                        for other in range(positions // PAGE)
                        if same_bits(here, donor[row, :, :, other * PAGE : other * PAGE + size])
                    ]
                    assert len(sources) == 1
                    assert sources != [page]
                    at_offsets.append((page, sources[0]))
            half = len(at_offsets) // 2
            assert at_offsets[:half] == at_offsets[half:], "keys and values are stale alike"
            offsets.add(event.offset)
    assert offsets == {PAGE * n for n in range(1, positions // PAGE)}


def test_masks_apply_to_pages():
    spec = CorruptionSpec("page_swap", parameter=1.0, share=0.5, time=("window", 8, 40), layers=[1])
    event = draw_event(spec, (L, G, 64), seeded())
    hit = event.time.nonzero().flatten().tolist()
    assert hit in [list(range(8, 16)) + list(range(16, 32)), list(range(8, 16)) + list(range(32, 40)),
                   list(range(16, 40))]  # fmt: skip
    assert event.layers.tolist() == [False, True]
    assert draw_event(CorruptionSpec("stale_page", parameter=1.0, share=0.0), SHAPE, seeded()).n_positions == 0


def test_more_pages_are_swapped_on_top_of_fewer():
    few, many = (
        draw_event(CorruptionSpec("page_swap", parameter=share), (L, G, 256), seeded(3)).time for share in (0.25, 0.5)
    )
    assert (few.sum(), many.sum()) == (64, 128)
    assert not (few & ~many).any()


# --- quantisation -----------------------------------------------------------------------------------------------------


def kivi_reference(x: np.ndarray, n_bits: int, group: int, axis: int) -> np.ndarray:
    """Vector by vector along the axis, group by group."""
    lines = np.moveaxis(x, axis, -1)
    result = np.empty_like(lines)
    for index in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], group):
            part = lines[index][start : start + group]
            low, step = part.min(), np.float32((part.max() - part.min()) / np.float32(2**n_bits - 1))
            codes = np.clip(np.round((part - low) / step), 0, 2**n_bits - 1)
            result[index][start : start + group] = codes * step + low
    return np.moveaxis(result, -1, axis)


@pytest.mark.parametrize("n_bits", FAULT_GRID["kivi_quant"])
@pytest.mark.parametrize("group", KIVI_GROUPS)
def test_quantisation_has_the_layout_of_kivi(group, n_bits):
    k, v = (torch.randn(1, L, G, 80, 48, generator=seeded(s)) * torch.rand(80, 48, generator=seeded(9)) for s in (0, 1))
    name = "kivi_quant" if group == 32 else f"kivi_quant_{group}"
    event = draw_event(CorruptionSpec(name, parameter=n_bits), (L, G, 80), seeded())
    k2, v2 = corrupt(k, v, [event], seeded())
    np.testing.assert_allclose(k2.numpy(), kivi_reference(k.numpy(), n_bits, group, axis=3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(v2.numpy(), kivi_reference(v.numpy(), n_bits, group, axis=4), rtol=1e-5, atol=1e-6)
    assert all(len(k2[0, 0, 0, :group, d].unique()) <= 2**n_bits for d in range(48))
    assert all(len(v2[0, 0, 0, t, :group].unique()) <= 2**n_bits for t in range(80))


def test_ranges_are_those_of_what_is_quantised():
    k, v = stored()
    constant = k.clone()
    constant[:, :, :, :, 0] = 3.5
    constant[:, :, :, 30:] = math.nan  # neither read nor written
    event = draw_event(CorruptionSpec("kivi_quant", parameter=3, time=("old_only", T - 30)), SHAPE, seeded())
    k2, _ = corrupt(constant, v, [event] * B, seeded())
    np.testing.assert_allclose(
        k2[:, :, :, :30, 1:], kivi_reference(constant[:, :, :, :30, 1:].numpy(), 3, 32, axis=3), rtol=1e-5, atol=1e-6
    )
    assert (k2[:, :, :, :30, 0] == 3.5).all()
    assert same_bits(k2[:, :, :, 30:], constant[:, :, :, 30:])


# --- the machinery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAULT_TYPES)
def test_only_masked_entries_change_and_the_same_seed_gives_the_same_bits(name, dtype):
    k, v, donor_k, donor_v = (x.to(dtype) for x in (*stored(), *stored(1)))
    spec = CorruptionSpec(name, parameter=STRONG[name], layers=0.7, heads=0.6, time=("old_only", 3), share=0.8)

    def run():
        generator = seeded(5)
        events = [draw_event(spec, SHAPE, generator) for _ in range(B)]
        return events, corrupt(k, v, events, generator, donor_k, donor_v)

    events, results = run()
    assert all(map(same_bits, run()[1], results))
    hit = torch.stack([(e.layers[:, None] & e.heads)[..., None] & e.time for e in events])
    assert hit.any()
    assert not hit[..., -3:].any()
    for clean, found in zip((k, v), results, strict=True):
        changed = (bits(clean) != bits(found)).any(-1)
        assert not changed[~hit].any()
        assert changed.any()
    for inactive in ({"severity": 0}, {"parameter": STRONG[name], "share": 0}):
        event = draw_event(CorruptionSpec(name, **inactive), SHAPE, seeded())
        assert all(map(same_bits, corrupt(k, v, [event] * B, seeded()), (k, v)))


@pytest.mark.parametrize("name", FAULT_GRID)
def test_the_default_grids_are_allowed_and_caches_of_models_take_every_fault(name):
    specs = [CorruptionSpec(name, parameter=parameter) for parameter in FAULT_GRID[name]]
    cache, donor = unstack_cache(*stored()), unstack_cache(*stored(1))
    broken = corrupt_cache(cache, specs[-1], seed=2, donor=donor)
    assert any((a != b).any() for a, b in zip(stack_cache(broken), stored(), strict=True))
    assert all(map(same_bits, stack_cache(cache), stored()))


def test_a_stale_page_of_a_cache_is_equally_far_off_in_every_layer():
    cache, donor = unstack_cache(*stored(0, 64)), unstack_cache(*stored(1, 64))
    k, _ = stack_cache(corrupt_cache(cache, CorruptionSpec("stale_page", parameter=1.0), donor=donor))
    for row in range(B):
        shifts = [
            [n for n in range(4) if same_bits(k[row, layer], stored(1, 64)[0][row, layer].roll(-n * PAGE, 1))]
            for layer in range(L)
        ]
        assert shifts[0] == shifts[1] != [0]


def test_evaluation_gives_pages_of_the_next_example():
    model = tiny_model()
    task = perplexity_task(tiny_tokenizer(), DOCUMENTS, seeds=(0, 1), n=3, prefix=32, scored=5)
    bank = clean_pass(model, task)
    donors = [1, 2, 0, 4, 5, 3]
    for name, distance in (("page_swap", 0), ("stale_page", PAGE)):
        frame = evaluate(model, task, bank, CorruptionSpec(name, parameter=1.0), {"none": NoDefense()})
        k, v = (x[donors].roll(-distance, 3) for x in (bank.k, bank.v))
        np.testing.assert_allclose(
            frame.nll, score(task, decode_logits(model, tokens_of(task, k, v), task))["nll"], rtol=1e-5
        )
        assert (frame.n_positions == 32).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "page_swap", "severity": 0.5}, "severity of page_swap is not calibrated.*parameter=.*share of pages"),
        ({"type": "bitflip_bf16", "severity": 1}, "not calibrated.*probability p per bit from 0 to 0.5"),
        ({"type": "bitflip_bf61", "parameter": 0.1}, "did you mean 'bitflip_bf16'"),
        ({"type": "bitflip_int8_exponent", "parameter": 0.1}, "unknown corruption type"),
        ({"type": "bitflip_fp16", "parameter": 0.6}, "0.6 of bitflip_fp16 is out of range"),
        ({"type": "stale_page", "parameter": 1.5}, "1.5 of stale_page"),
        ({"type": "kivi_quant", "parameter": 2.5}, "whole number from 1 to 8"),
    ],
)
def test_bad_faults_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CorruptionSpec(**options)


def test_faults_that_cannot_be_drawn_are_refused():
    k, v = stored()
    for name in ("page_swap", "stale_page"):
        event = draw_event(CorruptionSpec(name, parameter=1.0), SHAPE, seeded())
        with pytest.raises(ValueError, match=f"{name} needs a donor cache, got none"):
            corrupt(k, v, [event] * B, seeded())
        with pytest.raises(ValueError, match=f"the donor holds {T - 1} positions, {name} needs {T}"):
            corrupt(k, v, [event] * B, seeded(), *stored(1, T - 1))
    with pytest.raises(ValueError, match="unknown corruption type 'page_swap'"):
        Mixture({"page_swap": 1.0})  # severities are drawn in training


QUANTISED = [("bitflip_int8", 1e-9), ("quant_noise", 1), ("quant_noise", 3), ("kivi_quant", 3), ("kivi_quant_64", 1)]


@pytest.mark.parametrize(("name", "parameter"), QUANTISED)
def test_numbers_that_are_not_finite_stay_and_spoil_no_others(name, parameter):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 2, 3, 40, 8, generator=generator)
    damaged = clean.clone()
    places = [(0, 0, 0, 3, 1), (0, 1, 2, 3, 4), (0, 1, 2, 39, 4), (0, 0, 1, 7, 0)]
    for place, value in zip(places, (torch.inf, -torch.inf, torch.nan, torch.inf), strict=True):
        damaged[place] = value
    damaged[0, 0, 2, 5] = torch.nan  # a whole vector
    spec = CorruptionSpec(name, parameter=parameter)
    events = [draw_event(spec, (2, 3, 40), generator)]
    for found in corrupt(damaged, damaged, events, generator):
        kept = damaged.isfinite()
        assert torch.equal(found[~kept].nan_to_num(), damaged[~kept].nan_to_num())
        assert found[kept].isfinite().all()
        assert (found - clean)[kept].abs().max() <= clean.abs().max()
