"""The Golay code by its properties: distance 8, three wrong bits put right, four seen, and nothing else touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemedic.defenses.golay import correct, encode, symbol_count

words = st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=10)


def as_symbols(row: list[int]) -> list[int]:
    """The bits of words, least significant first, in twelves."""
    bits = [word >> i & 1 for word in row for i in range(16)]
    bits += [0] * (-len(bits) % 12)
    return [sum(bit << i for i, bit in enumerate(bits[at : at + 12])) for at in range(0, len(bits), 12)]


def test_all_code_words_but_zero_have_the_weights_of_the_golay_code() -> None:
    """8, 12, 16 and 24, as often as the textbook says (MacWilliams and Sloane, chapter 2)."""
    symbols = torch.arange(2**12, dtype=torch.int32)
    checks = encode(symbols[:, None])[:, 0].int()  # the first symbol of a word below 4096
    code = (symbols | checks << 12).tolist()
    weights = [word.bit_count() for word in code]
    assert {w: weights.count(w) for w in set(weights)} == {0: 1, 8: 759, 12: 2576, 16: 759, 24: 1}


@given(words, st.data())
def test_up_to_three_wrong_bits_of_each_code_word_are_put_right(row, data) -> None:
    written = torch.tensor(row, dtype=torch.int32)
    stored, checks = written.clone(), encode(written)
    for symbol in range(symbol_count(len(row))):
        for bit in data.draw(st.sets(st.integers(0, 23), max_size=3)):
            place = 12 * symbol + bit
            if bit >= 12:
                checks[symbol] ^= 1 << bit - 12
            elif place < 16 * len(row):
                stored[place // 16] ^= 1 << place % 16
    assert torch.equal(correct(stored, encode(stored) ^ checks), written)


@given(words, st.data())
def test_four_wrong_bits_are_seen_and_their_values_read_as_zeros(row, data) -> None:
    written = torch.tensor(row, dtype=torch.int32)
    stored = written.clone()
    full = 16 * len(row) // 12
    symbol = data.draw(st.integers(0, full - 1))
    for bit in data.draw(st.sets(st.integers(0, 11), min_size=4, max_size=4)):
        place = 12 * symbol + bit
        stored[place // 16] ^= 1 << place % 16
    read = correct(stored, encode(stored) ^ encode(written))
    lost = torch.zeros(len(row), dtype=torch.bool)
    lost[12 * symbol // 16 : (12 * symbol + 11) // 16 + 1] = True
    assert torch.equal(read, written.masked_fill(lost, 0))


@given(words, words)
def test_the_code_is_linear_and_works_symbol_by_symbol(a, b) -> None:
    a, b = a[: len(b)], b[: len(a)]
    x, y = (torch.tensor(row, dtype=torch.int32) for row in (a, b))
    assert torch.equal(encode(x ^ y), encode(x) ^ encode(y))
    alone = [int(encode(torch.tensor([s], dtype=torch.int32))[0]) for s in as_symbols(a)]
    assert encode(x).tolist() == alone


@pytest.mark.parametrize(("values", "symbols"), [(1, 2), (3, 4), (64, 86), (192, 256)])
def test_code_words_are_counted(values, symbols) -> None:
    assert symbol_count(values) == symbols == encode(torch.zeros(2, values, dtype=torch.int32)).shape[-1]
