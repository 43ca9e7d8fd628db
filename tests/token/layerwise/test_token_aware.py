"""Families D and E at work on whole caches: what they leave alone, what they restore, and their runs."""

import math

import pytest
import torch
from small_models import shaken
from tiny_repair import base_of, calibrated, case, repair_at_once

from cachemedic.defenses.defense import CachedTokens
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.layerwise.scrub import Scrubber, positions_of

BOTH = pytest.mark.parametrize("architecture", ["gpt2", "llama"])
FAMILIES = pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])


def scrub(operator, k, v, architecture="gpt2", c=None):
    """Repaired k, v, and what was found, of stored k, v of a case whose clean cache was written."""
    c = c or case(architecture)
    scrubber = Scrubber(base_of(architecture).model, operator)
    codes = scrubber.write(CachedTokens.behind_padding(c.k, c.v, c.ids, c.valid))
    stored = k, v, c.ids, positions_of(c.valid), codes
    return *scrubber.scrub(*stored)[:2], scrubber.repair(*stored)


def at_once(operator, k, v, architecture):
    """The same by the slow reference."""
    c, scrubber = case(architecture), Scrubber(base_of(architecture).model, operator)
    return repair_at_once(
        scrubber, k, v, c.ids, c.valid, scrubber.write(CachedTokens.behind_padding(c.k, c.v, c.ids, c.valid))
    )


def some_tokens(c, share: float = 0.4) -> torch.Tensor:
    """A part of the tokens [B, T], none of them padding."""
    return (torch.rand(c.ids.shape, generator=torch.Generator().manual_seed(3)) < share) & c.valid


def same(x, y) -> bool:
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def error(found, c, where) -> float:
    """Root mean square error at the tokens `where` [B, T]."""
    apart = torch.stack([x - clean for x, clean in zip(found, (c.k, c.v), strict=True)])
    return apart.movedim(4, 2)[:, where].square().mean().sqrt().item()


@BOTH
@FAMILIES
def test_a_new_operator_changes_no_bit_and_learns_at_once(architecture, family):
    c = case(architecture)
    damaged = c.damaged(some_tokens(c))
    operator = shaken(calibrated(architecture, family), 0.1)
    operator.strength.data.zero_()
    assert same(scrub(operator, *damaged, architecture)[:2], damaged)
    k, v, _ = at_once(operator, *damaged, architecture)
    assert same((k, v), damaged)
    loss = (k - c.k).square().sum() + (v - c.v).square().sum()
    loss.backward()
    assert (operator.strength.grad < 0).all(), "a step downhill turns it on"
    fresh = RepairOperator.create(family, base_of(architecture).model.config, (0, 1, 2))
    assert not fresh.strength.any()


@BOTH
@FAMILIES
def test_every_parameter_that_takes_part_gets_a_gradient(architecture, family):
    c = case(architecture)
    operator = shaken(calibrated(architecture, family), 0.02)
    operator.strength.data.fill_(0.7 / 32)
    k, v, repair = at_once(operator, *c.damaged(some_tokens(c)), architecture)
    (k.square().sum() + v.square().sum() + repair.bias.sum()).backward()
    for name, p in operator.named_parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@BOTH
@FAMILIES
@pytest.mark.parametrize(("share", "window"), [(0.4, 8), (0.05, 0), (0.2, 1)])
def test_a_scrub_is_the_repair_of_the_whole_cache(architecture, family, share, window):
    c = case(architecture)
    operator = shaken(calibrated(architecture, family, window=window, bias=True), 0.1)
    operator.strength.data.fill_(1.0)
    damaged = c.damaged(some_tokens(c, share))
    damaged[0][2, 1, 0, -2] = math.nan
    found, expected = (repair(operator, *damaged, architecture) for repair in (scrub, at_once))
    for x, y in zip((*found[:2], found[2].bias), (*expected[:2], expected[2].bias), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@BOTH
def test_e_leaves_sound_tokens_bit_for_bit_beside_damaged_ones(architecture):
    c = case(architecture)
    operator = shaken(calibrated(architecture, "layerwise-E"), 0.05)
    operator.strength.data.fill_(1.0)
    k, v, repair = scrub(operator, c.k, c.v, architecture)
    assert same((k, v), (c.k, c.v))
    last = torch.zeros_like(c.valid)
    last[1, -1] = True
    for token in (some_tokens(c), last):
        damaged = c.damaged(token)
        k, v, repair = scrub(operator, *damaged, architecture)
        sound = ~token[:, None, None, :, None]
        assert same((k * sound, v * sound), (c.k * sound, c.v * sound))
        changed = (repair.correction != 0).any(-1)
        assert not changed.movedim(1, -1)[~token].any()
        assert changed.movedim(1, -1)[token].float().mean() > 0.9
        assert not repair.bias.movedim(1, 2)[~token].any()


@BOTH
@pytest.mark.parametrize("size", [0.5, 2.0])
def test_e_restores_the_more_the_more_it_keeps(architecture, size):
    c = case(architecture)
    where = some_tokens(c)
    damaged = c.damaged(where, size)
    errors = [error(damaged, c, where)]
    for share in (0.02, 0.2):
        k, v, _ = scrub(calibrated(architecture, "layerwise-E", share=share, coordinates=8), *damaged, architecture)
        errors.append(error((k, v), c, where))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.5 * errors[0]


@BOTH
@FAMILIES
@pytest.mark.parametrize("known_layers", [1, 2, 3])
def test_layers_that_ids_tell_are_restored(architecture, family, known_layers):
    c = case(architecture)
    damaged = c.damaged(some_tokens(c))
    operator = calibrated(architecture, family, known_layers=known_layers)
    k, v, repair = scrub(operator, *damaged, architecture)
    for x, clean in ((k, c.k), (v, c.v)):
        torch.testing.assert_close(x[:, :known_layers], clean[:, :known_layers], rtol=1e-4, atol=1e-4)
    hit = (repair.correction[:, :known_layers] != 0).any(-1)
    assert torch.equal(hit, some_tokens(c)[:, None].expand_as(hit))


@BOTH
@FAMILIES
def test_padding_is_never_changed_and_changes_nothing(architecture, family):
    c = case(architecture)
    operator = shaken(calibrated(architecture, family, bias=True), 0.1)
    operator.strength.data.fill_(1.0)
    damaged = c.damaged(some_tokens(c))
    k, v, repair = scrub(operator, *damaged, architecture)
    padding = ~c.valid[:, None, None, :, None]
    assert padding.any()
    assert same((k * padding, v * padding), (damaged[0] * padding, damaged[1] * padding))
    for found in (repair.correction, repair.bias, repair.suspicion):
        assert not found.movedim(2, 1)[~c.valid].any()
    wild = [torch.where(padding, torch.tensor([1e6, math.nan])[torch.arange(8) % 2], x) for x in damaged]
    again = scrub(operator, *wild, architecture)[:2]
    assert same([x.masked_fill(padding, 0) for x in again], [x.masked_fill(padding, 0) for x in (k, v)])
    for row, length in enumerate(c.valid.sum(1).tolist()):  # each row alone, without its padding
        own = type(c)(*(x[row : row + 1, ..., -length:, :] for x in (c.k, c.v)), *(
            x[row : row + 1, -length:] for x in (c.ids, c.valid)
        ))  # fmt: skip
        alone = scrub(operator, *(x[row : row + 1, ..., -length:, :] for x in damaged), architecture, own)
        for x, y in zip(alone[:2], (k, v), strict=True):
            torch.testing.assert_close(x[0], y[row, ..., -length:, :], rtol=1e-3, atol=1e-4)


@BOTH
@FAMILIES
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_what_is_not_finite_never_comes_out(architecture, family, strength):
    c = case(architecture)
    k, v = c.k.clone(), c.v.clone()
    t = k.shape[3] - 3
    k[0, 0, 1, t, 2], k[1, 2, 0, t, :] = math.nan, -math.inf
    v[2, 1, 1, t + 1, 3], v[3, 2, 0, t, 5], v[3, 2, 1, t, :] = 1e38, math.inf, math.nan
    before = k.clone(), v.clone()
    mended = scrub(calibrated(architecture, family, strength=strength), k, v, architecture)
    for x, clean in zip(mended[:2], (c.k, c.v), strict=True):
        assert x.isfinite().all()
        assert (x - clean).abs().max() < 20 * clean.std()
    torch.testing.assert_close((k, v), before, equal_nan=True, rtol=0, atol=0)
    assert all(x.isfinite().all() for x in (mended[2].correction, mended[2].bias, mended[2].suspicion))
    if strength and family == "layerwise-E":
        assert error(mended[:2], c, c.valid) < error([torch.nan_to_num(x).clamp(-9, 9) for x in (k, v)], c, c.valid)


@FAMILIES
def test_runs_repair_as_each_alone(family):
    c = case("llama")
    damaged = c.damaged(some_tokens(c))
    both = shaken(calibrated("llama", family, runs=2, seed=3, per_layer=True, bias=True), 0.2)
    both.strength.data.copy_(torch.tensor([[0.5 / 32], [1.0]]))
    found = scrub(both, *damaged, "llama")
    assert same(scrub(both, *damaged, "llama")[:2], found[:2]), "twice the same"
    alone = []
    for run, rows in enumerate((slice(0, 2), slice(2, 4))):
        own = type(c)(c.k[rows], c.v[rows], c.ids[rows], c.valid[rows])
        alone.append(scrub(both.select(run), *(x[rows] for x in damaged), "llama", own))
        for x, y in zip(found[:2], alone[run][:2], strict=True):
            torch.testing.assert_close(y, x[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[run][2].bias, found[2].bias[rows], rtol=1e-4, atol=1e-5)
    again = RepairOperator.stack([both.select(0), both.select(1)])
    assert same(scrub(again, *damaged, "llama")[:2], found[:2])
    assert not torch.allclose(scrub(both.select(0), *damaged, "llama")[0][2:], found[0][2:], atol=1e-3)


@FAMILIES
@pytest.mark.parametrize("layers", [(1,), (0, 2), (1, 2)])
def test_layers_that_are_not_protected_are_left_alone(layers, family):
    c = case("llama")
    damaged = c.damaged(some_tokens(c))
    operator = calibrated("llama", family, layers=layers, known_layers=2)
    assert operator.known_layers == sum(layer < 2 for layer in layers)
    k, v, repair = scrub(operator, *damaged, "llama")
    assert repair.correction.shape[1] == len(layers)
    for layer in range(3):
        unchanged = same((k[:, layer], v[:, layer]), (damaged[0][:, layer], damaged[1][:, layer]))
        assert unchanged == (layer not in layers)


@FAMILIES
def test_without_a_prior_it_repairs_as_well_and_ids_do_not_matter(family):
    c = case("gpt2")
    where = some_tokens(c)
    damaged = c.damaged(where)
    operator = calibrated("gpt2", family, known_layers=0, share=0.2, coordinates=8)
    found = scrub(operator, *damaged)
    other = type(c)(c.k, c.v, c.ids.flip(1), c.valid)
    assert same(scrub(operator, *damaged, c=other)[:2], found[:2])
    if family == "layerwise-E":
        assert error(found[:2], c, where) < 0.5 * error(damaged, c, where)


@BOTH
@FAMILIES
def test_a_bf16_cache_stays_one_and_is_repaired_alike(architecture, family):
    c = case(architecture)
    where = some_tokens(c)
    damaged = c.damaged(where)
    operator = calibrated(architecture, family, share=0.2)
    full = scrub(operator, *damaged, architecture)
    half = type(c)(c.k.bfloat16(), c.v.bfloat16(), c.ids, c.valid)
    k, v, _ = scrub(operator, *(x.bfloat16() for x in damaged), architecture, half)
    assert k.dtype == v.dtype == torch.bfloat16
    assert error((k.float(), v.float()), c, where) == pytest.approx(error(full[:2], c, where), rel=0.1)
    if family == "layerwise-E":
        sound = ~where[:, None, None, :, None]
        kept = scrub(operator, half.k, half.v, architecture, half)[:2]
        for x, y, stored in ((k, kept[0], half.k), (v, kept[1], half.v)):
            assert torch.equal((x * sound)[:, 1:], (stored * sound)[:, 1:])
            torch.testing.assert_close(y, stored, rtol=2**-7, atol=0)
