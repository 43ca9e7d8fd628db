"""The hash of stored tokens: every changed bit is seen, and where it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachemedic.token.hashes import Hashes, TokenHash

LAYERS, ROWS, HEADS, TOKENS, WIDTH = 3, 2, 2, 5, 8
FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stored(dtype, seed=0):
    """Keys and values of all layers."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, LAYERS, ROWS, HEADS, TOKENS, WIDTH, generator=generator).to(dtype)
    return list(both[0]), list(both[1])


def hasher(dtype, seed=1):
    return TokenHash(LAYERS, HEADS, WIDTH, dtype, seed)


def by_hand(hasher, keys, values):
    """The same hashes in Python's integers."""
    multipliers = hasher.multipliers.long().flatten().tolist()
    whole, parts = torch.zeros(ROWS, TOKENS, dtype=torch.int64), torch.zeros(ROWS, TOKENS, LAYERS, 2).short()

    def signed(number, bits):
        number %= 2**bits
        return number - 2**bits if number >= 2 ** (bits - 1) else number

    for row in range(ROWS):
        for token in range(TOKENS):
            total = 0
            for layer in range(LAYERS):
                for side, x in enumerate((keys, values)):
                    words = x[layer][row, :, token].contiguous().view(torch.int16).flatten().tolist()
                    h = sum(a * w for a, w in zip(multipliers, words, strict=True))
                    total += h * int(hasher.of_place[layer, side])
                    parts[row, token, layer, side] = signed((h * int(hasher.of_part)) % 2**64 >> 48, 16)
            whole[row, token] = signed(total, 64)
    return Hashes(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_hash_that_is_stated(dtype):
    keys, values = stored(dtype)
    found, expected = hasher(dtype).of(keys, values), by_hand(hasher(dtype), keys, values)
    assert torch.equal(found.whole, expected.whole)
    assert torch.equal(found.parts, expected.parts)


@settings(max_examples=200)
@given(
    dtype=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**31),
    places=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(0, LAYERS - 1),
            st.integers(0, ROWS - 1),
            st.integers(0, HEADS - 1),
            st.integers(0, TOKENS - 1),
            st.integers(0, WIDTH - 1),
            st.integers(0, 63),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_any_flipped_bits_are_seen(dtype, seed, places):
    keys, values = stored(dtype)
    before = hasher(dtype, seed).of(keys, values)
    flips = torch.zeros(2, LAYERS, ROWS, HEADS, TOKENS, WIDTH, dtype=torch.int64)
    for *place, bit in places:
        flips[tuple(place)] ^= 1 << (bit % (8 * dtype.itemsize)) if bit < 63 else -(2**63)
    bits = INTEGERS[dtype.itemsize]
    changed = flips.to(bits) != 0
    for side, x in enumerate((keys, values)):
        for layer in range(LAYERS):
            x[layer].view(bits).bitwise_xor_(flips[side, layer].to(bits))
    after = hasher(dtype, seed).of(keys, values)
    assert torch.equal(before.whole != after.whole, changed.any(5).any(3).any(1).any(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_single_bit_is_seen_where_it_is(dtype):
    keys, values = stored(dtype)
    before = hasher(dtype).of(keys, values)
    words = values[1].view(INTEGERS[dtype.itemsize])
    for head in range(HEADS):
        for number in range(WIDTH):
            for bit in range(8 * dtype.itemsize):
                mask = torch.tensor(1 << bit).to(words.dtype)
                words[1, head, 3, number] ^= mask
                after = hasher(dtype).of(keys, values)
                assert (before.whole != after.whole).nonzero().tolist() == [[1, 3]]
                assert (before.parts != after.parts).nonzero().tolist() == [[1, 3, 1, 1]]
                words[1, head, 3, number] ^= mask


def test_pairs_of_sign_flips_do_not_cancel():
    keys, values = stored(torch.bfloat16)
    before = hasher(torch.bfloat16).of(keys, values)
    keys[0].view(torch.int16)[:, :, :, :2] ^= -(2**15)
    after = hasher(torch.bfloat16).of(keys, values)
    assert (before.whole != after.whole).all()


def test_not_a_number_and_signed_zero_have_hashes_of_their_own():
    keys, values = stored(torch.float32)
    keys[0][0, 0, 0, 0] = torch.nan
    before = hasher(torch.float32).of(keys, values)
    assert torch.equal(before.whole, hasher(torch.float32).of(keys, values).whole)
    keys[0][0, 0, 0, 0] = 0.0
    zero = hasher(torch.float32).of(keys, values)
    keys[0][0, 0, 0, 0] = -0.0
    assert len({int(x.whole[0, 0]) for x in (before, zero, hasher(torch.float32).of(keys, values))}) == 3


def test_tokens_may_come_in_any_pieces_and_layouts(monkeypatch):
    keys, values = stored(torch.bfloat16)
    whole = hasher(torch.bfloat16).of(keys, values)
    pieces = [
        hasher(torch.bfloat16).of([k[:, :, part] for k in keys], [v[:, :, part] for v in values])
        for part in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    together = pieces[0].then(pieces[1]).then(pieces[2])
    strided = hasher(torch.bfloat16).of([k.mT.contiguous().mT for k in keys], values)
    for other in (together, strided):
        assert torch.equal(other.whole, whole.whole)
        assert torch.equal(other.parts, whole.parts)


def test_the_place_of_equal_content_counts_in_the_whole_and_not_in_the_parts():
    keys, values = stored(torch.float32)
    one = hasher(torch.float32)
    before, after = one.of(keys, values), one.of(keys[::-1], values[::-1])
    assert (before.whole != after.whole).all()
    assert torch.equal(before.parts.flip(2), after.parts)


def test_the_share_of_each_head():
    keys, values = stored(torch.float16)
    one = hasher(torch.float16)
    x = keys[0][0].transpose(0, 1)  # [T, G, d]
    shares, h = one.by_head(x), one.sums(keys, values)[0, :, 0, 0]
    assert torch.equal(shares[0, 0] + shares[1, 1], h)
    assert torch.equal(shares[0, 1] + shares[1, 0], one.sums([keys[0].flip(1)], [values[0]])[0, :, 0, 0])
    assert one.bits == 34


def test_changes_of_the_low_bits_only_collide_as_rarely_as_stated():
    generator = torch.Generator().manual_seed(5)
    seen = 0
    for seed in range(50):
        x = torch.randint(-3, 3, (1, 2, 400, 8), generator=generator).short().view(torch.float16)
        hashed = TokenHash(1, 2, 8, torch.float16, seed).of([x], [x])
        distinct = len({tuple(t) for t in x[0].view(torch.int16).transpose(0, 1).flatten(1).tolist()})
        assert len(set(hashed.whole[0].tolist())) == distinct
        seen += distinct
    assert seen > 10_000
