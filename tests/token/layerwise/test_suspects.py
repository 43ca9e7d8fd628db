"""A scrub of family E looks at what differs from its sketch, and does there what a look at all tokens would do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_statistics import informed
from sketch_caches import filled, protected
from small_models import VOCABULARY, model_of
from transformers import DynamicCache

from cachemedic.defenses.defense import CachedTokens
from cachemedic.models.cache import stack_cache
from cachemedic.token.layerwise import scrub as scrub_module
from cachemedic.token.layerwise import suspects as suspects_module
from cachemedic.token.layerwise.observation import observe
from cachemedic.token.layerwise.scrub import Scrubber, positions_of
from cachemedic.token.layerwise.suspects import pieces
from cachemedic.token.layerwise.token_vectors import split

ROWS, T = 3, 40


def scene(name, **options):
    model = model_of(name)
    scrubber = Scrubber(model, informed(model, **{"window": 3, "share": 0.1} | options))
    ids = torch.randint(1, VOCABULARY, (ROWS, T), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(T) >= torch.tensor([0, 5, 11])[:, None]
    positions, cache = positions_of(valid), DynamicCache()
    with torch.no_grad():
        model(ids, attention_mask=valid.long(), position_ids=positions.clamp_min(0), past_key_values=cache)
        k, v = stack_cache(cache)
        return scrubber, k, v, ids, positions, scrubber.write(CachedTokens.behind_padding(k, v, ids, valid))


def whole(scrubber, k, v, ids, positions, codes):
    """The scrub that looks at every token."""
    operator = scrubber.operator
    seen = observe(operator.transform, k, v, positions, scrubber.rotation.at(positions))
    known = scrubber.known(ids, positions)
    repair = operator.repair(seen, known, operator.code.understand(codes, positions == 0, known))
    return *split(seen.stored + repair.correction, k.shape[2]), repair


@pytest.mark.parametrize("piece", [4, 256])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_is_the_scrub_that_looks_at_every_token(name, share, piece, monkeypatch):
    monkeypatch.setattr(suspects_module, "PIECE", piece)
    scrubber, k, v, ids, positions, codes = scene(name)
    numbers = torch.Generator().manual_seed(1)
    hit = torch.rand(ROWS, 1, 1, T, 1, generator=numbers) < share
    layers = torch.rand(ROWS, 3, 1, T, 1, generator=numbers) < 0.5
    k, v = (x + hit * layers * torch.randn(x.shape, generator=numbers) for x in (k, v))
    if share:
        k[1, 2, 0, 2, 0], v[2, 1, 0, 30, 1] = torch.nan, torch.inf  # the first of them in padding
        v[0, 1, 1, 7, :3] = 0
    with torch.no_grad():
        *expected, repair = whole(scrubber, k, v, ids, positions, codes)
        *found, _ = scrubber.scrub(k, v, ids, positions, codes)
        small = scrubber.repair(k, v, ids, positions, codes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.correction, repair.correction, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small.suspicion, repair.suspicion, rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in found)
    if share == 0:
        assert torch.equal(found[0], k)
        assert torch.equal(found[1], v)
        assert not small.correction.any()


@pytest.mark.parametrize("chunk", [7, 256])
@pytest.mark.parametrize(
    "options", [{}, {"known_layers": 0}, {"strength": 0.02}, {"share": 0.0}, {"correction": False}]
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_quick_repair_writes_what_the_operator_says(name, options, chunk, monkeypatch):
    monkeypatch.setattr(suspects_module, "CHUNK", chunk)
    scrubber, k, v, ids, positions, codes = scene(name, rounds=0, **options)
    numbers = torch.Generator().manual_seed(1)
    hit = torch.rand(ROWS, 3, 1, T, 1, generator=numbers) < 0.3  # layers and tokens
    sound = ~hit[:, :, 0, :, 0]
    bad_k, bad_v = (x + hit * torch.randn(x.shape, generator=numbers) for x in (k, v))
    bad_k[1, 2, 0, 2, 0], bad_v[2, 1, 0, 30, 1], bad_v[0, 0, 1, 7, 0] = torch.nan, torch.inf, 1e30
    for row, layer, token in ((1, 2, 2), (2, 1, 30), (0, 0, 7)):  # the first of them in padding
        sound[row, layer, token] = False
    with torch.no_grad():
        *expected, repair = whole(scrubber, bad_k, bad_v, ids, positions, codes)
        *mended, found = scrubber.scrub(bad_k, bad_v, ids, positions, codes)
    torch.testing.assert_close(mended, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.suspicion, repair.suspicion, rtol=1e-3, atol=1e-3)
    changed = torch.zeros_like(sound)
    for new, old, clean in zip(mended, (bad_k, bad_v), (k, v), strict=True):
        assert new.isfinite().all()
        changed |= (new != old).any(-1).any(2)
        assert torch.equal(new.movedim(3, 2)[sound], clean.movedim(3, 2)[sound])
        if not options:  # the layer that the ids tell
            torch.testing.assert_close(
                *(x[:, 0].movedim(2, 1)[positions >= 0] for x in (new, clean)), atol=1e-4, rtol=0
            )
    assert torch.equal(found.changed, changed)


def test_sound_tokens_are_not_looked_at(monkeypatch):
    scrubber, k, v, ids, positions, codes = scene("llama")
    looked = []

    def counted(*args):
        looked.append(args[1].shape[3])
        return observe(*args)

    monkeypatch.setattr(scrub_module, "observe", counted)
    scrubber.scrub(k, v, ids, positions, codes)
    assert looked == []
    v[1, 2, 0, 20] += 1
    scrubber.scrub(k, v, ids, positions, codes)
    assert looked == [7]  # the token and a window of 3 on each side


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 4), st.floats(0, 1))
def test_pieces_hold_each_found_token_once_with_all_its_neighbours(seed, window, share):
    found = torch.rand(2, 30, generator=torch.Generator().manual_seed(seed)) < share
    owned = torch.zeros(2, 30, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suspects_module, "PIECE", 5)
        for tokens, fill, own in pieces(found, window):
            assert (tokens[:, own].shape[1]) <= 5
            for row in range(2):
                order = tokens[row].tolist()
                real = [t for t, filler in zip(order, fill[row].tolist(), strict=True) if not filler]
                assert real == sorted(real)
                for t in order[own]:
                    owned[row, t] += 1
                    if found[row, t]:
                        near = [n for n in range(t - window, t + window + 1) if 0 <= n < 30]
                        at = order.index(t)
                        left = t - near[0]
                        assert order[at - left : at - left + len(near)] == near
    assert (owned[found] == 1).all()
    assert owned.max() <= 1


def test_a_scrub_copies_no_layer_and_serves_caches_of_inference_mode():
    protected("llama", "layerwise-E", rounds=0)  # calibrated, with gradients
    with torch.inference_mode():
        *_, cache, _, _ = filled("llama", rounds=0)
    layer = cache.layers[1]
    storage, clean = layer.keys.data_ptr(), layer.keys.clone()
    with torch.inference_mode():
        layer.keys[0, 0, 4] += 1
    assert cache.scrub().changed == (0, 1, 0)
    assert layer.keys.data_ptr() == storage
    differs = (layer.keys != clean).any(-1).any(1)
    assert differs.nonzero().tolist() == [[0, 4]]
    assert (layer.keys - clean).abs().max() < 0.5
