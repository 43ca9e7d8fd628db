"""The rival that looks at token ids only: what it leaves alone, and what it replaces."""

import math

import pytest
import torch
from tiny_repair import base_of, calibrated, case

from cachemedic.defenses.defense import CachedTokens
from cachemedic.token.layerwise.prior_alone import PriorAlone
from cachemedic.token.layerwise.scrub import Scrubber

BOTH = pytest.mark.parametrize("architecture", ["gpt2", "llama"])


def read(architecture: str, k, v, **options):
    c = case(architecture)
    prior = PriorAlone(Scrubber(base_of(architecture).model, calibrated(architecture, "layerwise-D", **options)))
    assert prior.bytes_per_token == 0
    return prior.read(CachedTokens.behind_padding(k, v, c.ids, c.valid), None)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sound_cache_keeps_every_bit(architecture, dtype):
    c = case(architecture)
    k, v = c.k.to(dtype), c.v.to(dtype)
    mended = read(architecture, k, v)
    assert torch.equal(mended.k, k)
    assert torch.equal(mended.v, v)


@BOTH
@pytest.mark.parametrize("wild", [math.nan, math.inf, 1e30, 1e4])
def test_a_wild_number_in_an_upper_layer_has_its_token_replaced(architecture, wild):
    c = case(architecture)
    k, v = c.k.clone(), c.v.clone()
    k[1, 2, 1, -4, 3] = v[2, 1, 0, -1, 5] = wild
    mended = read(architecture, k, v)
    hit = torch.zeros_like(c.valid)
    hit[1, -4] = hit[2, -1] = True
    at = hit[:, None, None, :, None].expand_as(k)
    known, unknown = mended.k[:, :1], mended.k[:, 1:]
    torch.testing.assert_close(known, c.k[:, :1], rtol=1e-4, atol=1e-4)  # told by the id
    assert (unknown[at[:, 1:]] != c.k[:, 1:][at[:, 1:]]).all(), "and the others by what follows from it"
    for x, clean in ((mended.k, c.k), (mended.v, c.v)):
        assert torch.equal(x[~at], clean[~at])
        assert (x[at] - clean[at]).abs().max() < 9 * clean.std()


def test_wild_numbers_of_padding_never_reach_attention():
    c = case("llama")
    assert not c.valid[1, 0]
    k, v = c.k.clone(), c.v.clone()
    k[1, 2, 0, 0, 1], v[1, 0, 1, 0, 2] = math.nan, math.inf
    mended = read("llama", k, v)
    assert mended.k.isfinite().all()
    assert mended.v.isfinite().all()
    for x, clean in ((mended.k, c.k), (mended.v, c.v)):
        assert torch.equal(x.movedim(3, 1)[c.valid], clean.movedim(3, 1)[c.valid])


@BOTH
def test_damage_below_is_undone_above_as_far_as_the_ids_tell(architecture):
    c = case(architecture)
    where = c.valid & (torch.arange(c.valid.shape[1]) % 3 == 0)
    damaged = c.damaged(where)
    mended = read(architecture, *damaged, known_layers=2)
    torch.testing.assert_close(mended.k[:, :2], c.k[:, :2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mended.v[:, :2], c.v[:, :2], rtol=1e-4, atol=1e-4)
    again = read(architecture, *c.damaged(where, size=5.0), known_layers=2)
    for x, y in zip((mended.k, mended.v), (again.k, again.v), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # no damaged number is believed


def test_an_operator_without_a_prior_is_refused():
    with pytest.raises(ValueError, match="this operator has known_layers = 0"):
        read("gpt2", case("gpt2").k, case("gpt2").v, known_layers=0)
