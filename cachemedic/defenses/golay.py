"""The extended Golay code (24, 12) over the stored bits (Golay 1949): up to three wrong bits of 24 are put right.

Each 12 bits of the words of a vector, one word after the other, have 12 check bits: as much again as is stored. Eleven
are the remainder of the cyclic code by x^11 + x^10 + x^6 + x^5 + x^4 + x^2 + 1, bit 11 makes the parity of the code
word even. All code words differ in 8 bits or more, so that four wrong bits are seen, and not put right.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

SYMBOL_BITS = 12  # data bits of a code word, and its check bits
WORDS, SYMBOLS = 3, 4  # so many words of 16 bits are so many symbols of 12
CORRECTED = 3  # wrong bits of a code word
_GENERATOR = 0b110001110101


def symbol_count(values: int) -> int:
    """How many code words the words of so many values make; the last may be filled up with zeros."""
    return -(-16 * values // SYMBOL_BITS)


def encode(words: Tensor) -> Tensor:
    """The check bits, int16 [..., n], of words [..., d], 0 to 65535; n is `symbol_count(d)`."""
    return _look_up(_check_table(), _symbols(words))


def correct(words: Tensor, syndrome: Tensor) -> Tensor:
    """Words [..., d] as the decoder returns them; syndrome [..., n]: check bits found ^ check bits written.

    Up to three wrong bits of a code word, check bits among them, are put right; with four its data counts as lost, and
    every value that has a part of it becomes zero. Of more, some are taken for fewer, as in hardware.
    """
    flips, lost = (_look_up(table, syndrome) for table in _decoding_tables())
    masks = _words(lost.int() * (2**SYMBOL_BITS - 1), words.shape[-1])
    return (words ^ _words(flips.int(), words.shape[-1])).masked_fill_(masks != 0, 0)


def _symbols(words: Tensor) -> Tensor:
    """The bits of words [..., d] in symbols of 12, int32 [..., n]."""
    padded = F.pad(words, (0, -words.shape[-1] % WORDS)).int()
    a, b, c = padded.unflatten(-1, (-1, WORDS)).unbind(-1)
    parts = (a & 0xFFF, a >> 12 | (b & 0xFF) << 4, b >> 8 | (c & 0xF) << 8, c >> 4)
    return torch.stack(parts, -1).flatten(-2)[..., : symbol_count(words.shape[-1])]


def _words(symbols: Tensor, values: int) -> Tensor:
    """The inverse of `_symbols`: words [..., values]."""
    padded = F.pad(symbols, (0, -symbols.shape[-1] % SYMBOLS))
    a, b, c, d = padded.unflatten(-1, (-1, SYMBOLS)).unbind(-1)
    parts = (a | (b & 0xF) << 12, b >> 4 | (c & 0xFF) << 8, c >> 8 | d << 4)
    return torch.stack(parts, -1).flatten(-2)[..., :values]


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.to(index.device).index_select(0, index.flatten().int()).view(index.shape)


@lru_cache(maxsize=1)
def _check_table() -> Tensor:
    """The check bits of each symbol, int16 [4096]."""
    symbols = torch.arange(2**SYMBOL_BITS)
    remainder = symbols << 11
    for bit in range(22, 10, -1):
        remainder ^= (remainder >> bit & 1) * (_GENERATOR << bit - 11)
    code = symbols << 11 | remainder
    parity = sum(code >> bit & 1 for bit in range(23)) & 1
    return (remainder | parity << 11).short()


@lru_cache(maxsize=1)
def _decoding_tables() -> tuple[Tensor, Tensor]:
    """By syndrome: which data bits to flip, int16 [4096], and whether it is of four wrong bits, bool [4096]."""
    checks = _check_table()
    flips, lost = torch.zeros_like(checks), torch.ones(len(checks), dtype=torch.bool)
    single = [1 << bit for bit in range(2 * SYMBOL_BITS)]  # data bits, then check bits
    for weight in range(CORRECTED + 1):
        for bits in combinations(single, weight):
            data, check = sum(bits) & 0xFFF, sum(bits) >> SYMBOL_BITS
            syndrome = int(checks[data]) ^ check
            flips[syndrome], lost[syndrome] = data, False
    return flips, lost
