"""A rotation that the tokens of a row share is undone; any other damage is left to the estimate."""

import pytest
import torch
from checked_caches import filled, numbers
from joint_operators import operator_of
from small_models import VOCABULARY, model_of
from transformers import DynamicCache

from cachemedic.corruption.types import rotation
from cachemedic.models.cache import stack_cache
from cachemedic.token.parts import Parts
from cachemedic.token.shared_rotation import undo_shared_rotation
from cachemedic.token.vectors import TokenVectors

PARTS, ROWS, LENGTH = Parts(layers=4, heads=3, width=8), 2, 60
FIRST = 4  # tokens of which too little is known
POSITIONS = torch.arange(LENGTH).expand(ROWS, -1)


def drawn(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(ROWS, LENGTH, PARTS.count * PARTS.width, generator=generator)


def turned(x, theta=0.5, seed=7):
    return (PARTS.split(x) @ rotation(seed, PARTS.width, theta).float()).flatten(-2)


@pytest.fixture
def predicted():
    return drawn(0)


@pytest.fixture
def clean(predicted):
    return predicted + drawn(1, 0.5)


def test_a_shared_rotation_is_undone(predicted, clean):
    bad = torch.stack([turned(clean, 0.5, 7)[0], turned(clean, 0.9, 8)[1]])  # of each row another one
    found = undo_shared_rotation(bad, predicted, None, PARTS, POSITIONS)
    assert (found - clean).square().mean() < 0.02 * (bad - clean).square().mean()


@pytest.mark.parametrize(("hit_tokens", "hit_parts"), [(0.5, 1.0), (1.0, 0.5), (0.6, 0.6)])
def test_what_it_did_not_hit_keeps_every_bit(predicted, clean, hit_tokens, hit_parts):
    generator = torch.Generator().manual_seed(2)
    hit = torch.rand(ROWS, LENGTH, 1, generator=generator) < hit_tokens
    hit = hit & (torch.rand(ROWS, 1, PARTS.count, generator=generator) < hit_parts)
    bad = torch.where(hit[..., None], PARTS.split(turned(clean)), PARTS.split(clean)).flatten(-2)
    found = PARTS.split(undo_shared_rotation(bad, predicted, None, PARTS, POSITIONS))
    error, before = ((x - PARTS.split(clean))[:, FIRST:].square() for x in (found, PARTS.split(bad)))
    assert error.sum() < 0.05 * before.sum()
    untouched = (~hit.any(2)[:, :, None] | ~hit.any(1)[:, None])[:, FIRST:]
    assert error.sum(-1)[untouched].eq(0).float().mean() > 0.99


def test_what_is_sound_keeps_every_bit(predicted, clean):
    sound = torch.rand(ROWS, LENGTH, PARTS.count, generator=torch.Generator().manual_seed(3)) < 0.3
    bad = PARTS.split(turned(clean)).clone()
    bad[sound] = PARTS.split(clean)[sound]
    found = PARTS.split(undo_shared_rotation(bad.flatten(-2), predicted, None, PARTS, POSITIONS, sound))
    assert torch.equal(found[sound], bad[sound])
    error, before = ((x - PARTS.split(clean))[:, FIRST:].square().sum() for x in (found, bad))
    assert error < 0.05 * before


def test_other_damage_is_left_as_it_was_read(predicted, clean):
    own = torch.stack([PARTS.split(clean)[:, t] @ rotation(t, PARTS.width, 0.5).float() for t in range(LENGTH)], 1)
    zeros = clean * (torch.rand(clean.shape, generator=torch.Generator().manual_seed(4)) > 0.5)
    damaged = {
        "a rotation of each token": own.flatten(-2),
        "noise": clean + drawn(5),
        "another text": drawn(6, 1.2),
        "zeros": zeros,
        "nothing": clean,
        "not finite": torch.full_like(clean, torch.nan),
    }
    for name, bad in damaged.items():
        assert undo_shared_rotation(bad, predicted, None, PARTS, POSITIONS) is bad, name


def test_few_tokens_show_no_rotation(predicted, clean):
    few = slice(10, 13)
    bad = turned(clean)[:, few]
    assert undo_shared_rotation(bad, predicted[:, few], None, PARTS, POSITIONS[:, few]) is bad


@pytest.fixture(params=["llama", "gpt2"])
def cached(request):
    model = model_of(request.param)
    ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    return request.param, model, ids, torch.arange(LENGTH).expand(2, -1), *stack_cache(cache)


@pytest.mark.parametrize("share", [None, 0.4])
def test_an_operator_repairs_a_rotated_cache_almost_wholly(cached, share):
    name, model, ids, positions, keys, values = cached
    operator = operator_of(name, share)
    kept = operator.write_tokens(model, keys, values, ids, positions)
    turn = rotation(11, keys.shape[-1], 0.8).float()
    bad = keys @ turn, values @ turn
    found = operator.repair(model, *bad, ids, positions, kept)
    error, before = (
        sum(
            float((new.detach() - old)[..., FIRST:, :].square().sum())
            for new, old in zip(side, (keys, values), strict=True)
        )
        for side in (found, bad)
    )
    assert error < 0.2 * before


def test_of_another_text_nothing_is_believed(cached):
    name, model, ids, positions, keys, values = cached
    operator = operator_of(name, 0.4)
    kept = operator.write_tokens(model, keys, values, ids, positions)
    bad = keys.roll(1, 0), values.roll(1, 0)
    restored, estimated = (operator.repair(model, *bad, ids, positions, kept, way) for way in ("restore", "estimate"))
    for new, old in zip(estimated, restored, strict=True):
        torch.testing.assert_close(new[..., FIRST:, :], old[..., FIRST:, :], atol=1e-2, rtol=0.0)


def test_without_ids_and_codes_no_token_is_another_one(cached):
    name, model, ids, positions, keys, values = cached
    operator = operator_of(name, None, with_ids=False)
    vectors = TokenVectors(model, operator.layers)
    in_training = operator.repair_with_prior(vectors, keys, values, None, positions)
    for new, old in zip(operator.repair(model, keys, values, ids, positions), in_training, strict=True):
        assert torch.equal(new, old)


def test_a_cache_heals_from_a_rotation():
    model, cache, _, _ = filled(length=LENGTH, operator=operator_of("llama", 0.4))
    before = [x[:, :, FIRST:].clone() for x in numbers(cache)]
    for layer in cache.layers:
        turn = rotation(11, layer.keys.shape[-1], 0.8).float()
        layer.keys.copy_(layer.keys @ turn)
        layer.values.copy_(layer.values @ turn)
    rotated = [x[:, :, FIRST:] for x in numbers(cache)]
    cache.repair("estimate")
    healed = [x[:, :, FIRST:] for x in numbers(cache)]
    error, damage = (
        sum((x - old).square().sum() for x, old in zip(side, before, strict=True)) for side in (healed, rotated)
    )
    assert error < 0.1 * damage


def test_one_huge_number_hides_no_rotation(predicted, clean):
    bad = turned(clean)
    bad[:, 20, 5] = 3e38  # whose square is no number of float32
    found = undo_shared_rotation(bad, predicted, None, PARTS, POSITIONS)
    others = [slot for slot in range(LENGTH) if slot != 20]
    assert (found - clean)[:, others].square().mean() < 0.02 * (bad - clean)[:, others].square().mean()
