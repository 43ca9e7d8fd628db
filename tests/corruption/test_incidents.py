"""Each incident damages the tokens that it names, as its name says, and nothing else."""

import pytest
import torch

from cachemedic.core.seeds import generator
from cachemedic.corruption.incidents import DRAFT, INCIDENTS, register_incident, strike
from cachemedic.corruption.storage_faults import PAGE

ROWS, LAYERS, HEADS, TOKENS, DIM = 3, 4, 2, 6 * PAGE, 8
PAGES_OF = torch.arange(TOKENS) // PAGE


def caches(seed=0):
    """Keys, values and their donors, of numbers below 1 that bf16 holds exactly."""
    draws = torch.Generator().manual_seed(seed)
    shape = (4, ROWS, LAYERS, HEADS, TOKENS, DIM)
    return (torch.randn(shape, generator=draws) / 8).bfloat16().float()


def struck(name, cache=None, turn=None):
    generators = [generator("test", row) for row in range(ROWS)]
    return strike(name, *(caches() if cache is None else cache), generators, turn)


def changed(name, turn=None):
    """Which numbers differ, bool [B, L, 2, G, T, d]."""
    k, v, _, _ = caches()
    return torch.stack([x != old for x, old in zip(struck(name, turn=turn), (k, v), strict=True)], 2)


def one_page(tokens):
    return len(PAGES_OF[tokens].unique()) == 1 and tokens.sum() == PAGE


def from_the_middle_of_a_page(tokens):
    start = int(tokens.int().argmax())
    return tokens[start:].all() and tokens.sum() == TOKENS - start and start % PAGE == PAGE // 2 and start > TOKENS // 2


def one_run_of_the_first_half(tokens):
    start = int(tokens.int().argmax())
    return tokens[start : start + TOKENS // 4].all() and tokens.sum() == TOKENS // 4 and not tokens[TOKENS // 2 :].any()


NAMED = {  # whether these are the tokens, bool [T], that the incident names
    "swapped_page": one_page,
    "stale_page": one_page,
    "overwritten_prefix": one_run_of_the_first_half,
    "rejected_drafts": lambda tokens: tokens[-DRAFT:].all() and tokens.sum() == DRAFT,
    "transfer_cut_zero": from_the_middle_of_a_page,
    "transfer_cut_old": from_the_middle_of_a_page,
    "packed_read_as_split": lambda tokens: tokens.all(),
    "permuted_heads": lambda tokens: tokens.all(),
    "wrong_positions": lambda tokens: tokens[2 * PAGE :].all() and not tokens[: 2 * PAGE].any(),
    "wrong_fp8_scale": lambda tokens: tokens.all(),
    "single_bit_flip": lambda tokens: tokens.sum() == 1,
    "multi_bit_flip": lambda tokens: tokens.sum() == 1,
    "zero_layer": lambda tokens: tokens.all(),
}
LAYERS_HIT = {"wrong_fp8_scale": LAYERS // 2, "single_bit_flip": 1, "multi_bit_flip": 1, "zero_layer": 1}


def test_every_incident_says_which_tokens_it_damages():
    assert set(NAMED) == set(INCIDENTS)


@pytest.mark.parametrize("name", NAMED)
def test_an_incident_changes_the_tokens_that_it_names(name):
    before = caches()
    hit = changed(name)
    for row in hit.transpose(1, 4).flatten(2).any(2):
        assert NAMED[name](row)
    layers = hit.flatten(2).any(2).sum(1)
    assert (layers == LAYERS_HIT.get(name, LAYERS)).all()
    assert torch.equal(before, caches())


@pytest.mark.parametrize("name", NAMED)
def test_what_was_given_stays_and_the_same_seed_gives_the_same_damage(name):
    cache = caches()
    k, v = struck(name, cache)
    assert torch.equal(cache, caches())
    again = struck(name)
    assert torch.equal(k.view(torch.int32), again[0].view(torch.int32))
    assert torch.equal(v.view(torch.int32), again[1].view(torch.int32))
    alone = strike(name, *(x[1:2] for x in cache), [generator("test", 1)])
    assert torch.equal(alone[0].view(torch.int32), k[1:2].view(torch.int32)), "a row draws from its generator alone"


@pytest.mark.parametrize("name", ["swapped_page", "overwritten_prefix", "rejected_drafts", "transfer_cut_old"])
def test_another_request_leaves_its_numbers_at_the_same_positions(name):
    cache = caches()
    for side, (old, donor) in enumerate(zip(cache[:2], cache[2:], strict=True)):
        new = struck(name)[side]
        hit = (new != old).any(-1, keepdim=True)
        assert torch.equal(new, torch.where(hit, donor, old))


def test_a_stale_page_holds_another_page_of_the_donor():
    cache = caches()
    k, _ = struck("stale_page")
    hit = (k != cache[0]).transpose(1, 3).flatten(2).any(2)  # [B, T]
    for row in range(ROWS):
        page = int(PAGES_OF[hit[row]][0])
        found = k[row, :, :, page * PAGE : (page + 1) * PAGE]
        sources = cache[2, row].split(PAGE, 2)
        same = [number for number, source in enumerate(sources) if torch.equal(found, source)]
        assert len(same) == 1
        assert same != [page]


def test_a_packed_layout_is_the_same_memory():
    k, v, _, _ = caches()
    for old, new in zip((k, v), struck("packed_read_as_split"), strict=True):
        assert torch.equal(new.transpose(2, 3).flatten(2), old.flatten(2))


def test_heads_come_in_another_order():
    k, v, _, _ = caches()
    for old, new in zip((k, v), struck("permuted_heads"), strict=True):
        assert torch.equal(new, old.flip(2)), "of two heads"


def test_rotated_keys_are_turned_and_values_stay():
    k, v, _, _ = caches()
    new_k, new_v = struck("wrong_positions", turn=lambda keys, n: keys + n)
    assert torch.equal(new_v, v)
    assert torch.equal(new_k[..., : 2 * PAGE, :], k[..., : 2 * PAGE, :])
    assert torch.equal(new_k[..., 2 * PAGE :, :], k[..., 2 * PAGE :, :] - PAGE)


def test_tokens_without_rotation_stand_a_page_later():
    k, _, _, _ = caches()
    assert torch.equal(struck("wrong_positions")[0][..., 2 * PAGE :, :], k[..., PAGE:-PAGE, :])


def test_a_wrong_scale_doubles_what_fp8_holds():
    k, v, _, _ = caches()
    for old, new in zip((k, v), struck("wrong_fp8_scale"), strict=True):
        layer = (new != old).flatten(2).any(2)
        ratio = (new / old)[layer]
        assert ratio.median() == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("name", "least", "most"), [("single_bit_flip", 1, 1), ("multi_bit_flip", 2, 8)])
def test_so_many_bits_of_one_number_flip(name, least, most):
    cache = caches()
    words = [x.bfloat16().view(torch.int16) for x in cache[:2]]
    new = [x.bfloat16().view(torch.int16) for x in struck(name)]
    flipped = torch.stack([a ^ b for a, b in zip(words, new, strict=True)], 1).flatten(1)
    assert ((flipped != 0).sum(1) == 1).all()
    for mask in flipped[flipped != 0].tolist():
        assert mask >> 14 & 1, "the highest exponent bit"
        assert least <= mask.bit_count() <= most
        assert (mask & 0x7FFF) + (mask & -mask) == 0x8000, "neighbours"


def test_a_layer_is_zero():
    for side in struck("zero_layer"):
        assert (side == 0).flatten(2).all(2).sum(1).tolist() == [1] * ROWS


def test_an_own_incident_is_used_by_its_name():
    @register_incident("last_token_lost")
    def last_token_lost(cache):
        kept = torch.ones_like(cache.k)
        kept[:, :, -1] = 0
        return cache.k * kept, cache.v * kept

    try:
        k, v = struck("last_token_lost")
        assert not k[:, :, :, -1].any()
        assert torch.equal(v[:, :, :, :-1], caches()[1][:, :, :, :-1])
    finally:
        INCIDENTS.remove("last_token_lost")


def test_what_does_not_fit_is_refused():
    cache, draws = caches(), [generator("test", row) for row in range(ROWS)]
    with pytest.raises(ValueError, match="unknown incident 'swaped_page'.*swapped_page"):
        strike("swaped_page", *cache, draws)
    with pytest.raises(ValueError, match="at least 64 positions, the cache holds 63"):
        strike("zero_layer", *cache[..., :63, :], draws)
    with pytest.raises(ValueError, match="donors must be"):
        strike("zero_layer", *cache[:3], cache[3, ..., :80, :], draws)
    with pytest.raises(ValueError, match="3 rows need as many generators, got 2"):
        strike("zero_layer", *cache, draws[:2])
