"""Codes over the stored bits: SECDED error correction of memory words, and the checksum of a token.

A value is stored as a word of 16 bits: its own for a 16-bit type, else those of bf16 (what bf16 rounds off is not
stored). SECDED (single error corrected, double detected) is the extended Hamming code (72, 64) of server memory
(Hamming 1950): 8 check bits for 64 data bits, here four values; bit 7 makes the parity of the code word even. The
checksum is CRC-16/CCITT (polynomial 0x1021, from 0xFFFF): it misses one in 65,536 random changes, and none of up to 3
bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch

CHECK_BITS = 8
VALUES_PER_WORD = 4  # 64 data bits of 16 each
CHECKSUM_BITS = 16
_CRC_POLYNOMIAL, _CRC_START = 0x1021, 0xFFFF


def stored_words(x: torch.Tensor) -> torch.Tensor:
    """The words of x [...], 0 to 65535, as int32."""
    if x.dtype.itemsize == 2:
        return x.view(torch.int16).int() & 0xFFFF
    # a conversion makes all NaN alike, and a NaN is often a single flipped bit away from a sound value
    bits = torch.where(x.isnan(), x.float().view(torch.int32) >> 16, x.bfloat16().view(torch.int16).int())
    return bits & 0xFFFF


def from_words(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of `dtype` that words [...] stand for: the inverse of `stored_words`."""
    bits = words.to(torch.int16)
    return bits.view(dtype) if dtype.itemsize == 2 else bits.view(torch.bfloat16).to(dtype)


def encode(words: torch.Tensor) -> torch.Tensor:
    """The check bits, uint8 [..., d / 4], of words [..., d]. Raises `ValueError` unless d is a multiple of 4."""
    if words.shape[-1] % VALUES_PER_WORD:
        raise ValueError(f"a code word holds {VALUES_PER_WORD} values; a head size of {words.shape[-1]} does not split")
    tables = _check_tables().to(words.device)
    parts = words.unflatten(-1, (-1, VALUES_PER_WORD)).unbind(-1)
    code = _look_up(tables[0], parts[0])
    for table, part in zip(tables[1:], parts[1:], strict=True):
        code ^= _look_up(table, part)
    return code


def correct(words: torch.Tensor, syndrome: torch.Tensor) -> torch.Tensor:
    """Words [..., d] as the decoder returns them; syndrome [..., d / 4]: check bits found ^ check bits written.

    A syndrome of odd parity that names a data bit flips it: right for one error, wrong for three or more, as in
    hardware. Any other that is not zero or of a check bit is uncorrectable, and its four values become zero.
    """
    result = words.unflatten(-1, (-1, VALUES_PER_WORD)).clone()
    wrong = syndrome.nonzero(as_tuple=True)  # few: all else stays as it is
    flips, uncorrectable = (table.to(words.device)[syndrome[wrong].long()] for table in _decoding_tables())
    result[wrong] = (result[wrong] ^ flips).masked_fill_(uncorrectable[:, None], 0)
    return result.flatten(-2)


def token_checksums(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The checksum of each token in each layer, int32 [B, L, T], over its keys and values [B, L, G, T, d]."""
    table = _crc_table().to(k.device)
    crc = torch.full_like(k[:, :, 0, :, 0], _CRC_START, dtype=torch.int32)
    for x in (k, v):
        words = stored_words(x).permute(2, 4, 0, 1, 3).flatten(0, 1).contiguous()  # [G * d, B, L, T]
        for word in words:
            crc = _look_up(table, crc ^ word)
    return crc


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, index.flatten()).view(index.shape)


def _columns() -> list[int]:
    """What each of the 64 data bits contributes to the check bits: all differ, and all are of odd weight."""
    positions = [p for p in range(1, 72) if p & (p - 1)]  # the powers of two hold check bits
    return [p | ((p.bit_count() + 1) % 2) << (CHECK_BITS - 1) for p in positions]


@lru_cache(maxsize=1)
def _check_tables() -> torch.Tensor:
    """The check bits of a code word that is zero but for its i-th value, uint8 [4, 65536]."""
    values = torch.arange(2**16)
    bits = values[:, None] >> torch.arange(16) & 1  # [65536, 16]
    tables = torch.zeros(VALUES_PER_WORD, 2**16, dtype=torch.uint8)
    for i, column in enumerate(_columns()):
        tables[i // 16] ^= (bits[:, i % 16] * column).to(torch.uint8)
    return tables


@lru_cache(maxsize=1)
def _decoding_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """By syndrome: the bits to flip, int32 [256, 4], and whether it is uncorrectable, bool [256]."""
    flips = torch.zeros(2**CHECK_BITS, VALUES_PER_WORD, dtype=torch.int32)
    uncorrectable = torch.ones(2**CHECK_BITS, dtype=torch.bool)
    uncorrectable[[0, *(1 << bit for bit in range(CHECK_BITS))]] = False
    for i, column in enumerate(_columns()):
        flips[column, i // 16] = 1 << i % 16
        uncorrectable[column] = False
    return flips, uncorrectable


@lru_cache(maxsize=1)
def _crc_table() -> torch.Tensor:
    """The remainder of each word, int32 [65536]."""
    crc = torch.arange(2**16)
    for _ in range(16):
        crc = ((crc << 1) ^ (crc >> 15) * _CRC_POLYNOMIAL) & 0xFFFF
    return crc.int()
