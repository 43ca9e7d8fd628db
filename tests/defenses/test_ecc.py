"""The code against bit-by-bit references: every single error, every double error, the standard CRC."""

import binascii

import pytest
import torch

from cachemedic.defenses.ecc import CHECK_BITS, correct, encode, from_words, stored_words, token_checksums

GENERATOR = torch.Generator().manual_seed(0)
WORDS = torch.randint(0, 2**16, (6, 8), generator=GENERATOR, dtype=torch.int32)


def hamming(data: list[int]) -> int:
    """The textbook construction on 64 bits: check bits at powers of two, the overall parity in bit 7."""
    code = [0] * 72
    places = [p for p in range(1, 72) if p & (p - 1)]
    for place, bit in zip(places, data, strict=True):
        code[place] = bit
    for i in range(7):
        code[1 << i] = sum(code[p] for p in range(1, 72) if p >> i & 1) % 2
    code[0] = sum(code) % 2
    return sum(code[1 << i] << i for i in range(7)) | code[0] << 7


def flipped(words: torch.Tensor, *bits: int) -> torch.Tensor:
    """Words [..., 4 n] with these data bits, 0 to 63, of every code word flipped."""
    result = words.clone().unflatten(-1, (-1, 4))
    for bit in bits:
        result[..., bit // 16] ^= 1 << bit % 16
    return result.flatten(-2)


def test_the_check_bits_are_those_of_the_textbook() -> None:
    for row, codes in zip(WORDS, encode(WORDS), strict=True):
        for word, code in zip(row.view(2, 4).tolist(), codes.tolist(), strict=True):
            assert code == hamming([word[i // 16] >> i % 16 & 1 for i in range(64)])


def test_no_error_changes_nothing() -> None:
    assert torch.equal(correct(WORDS, encode(WORDS) ^ encode(WORDS)), WORDS)


def test_every_single_error_is_corrected() -> None:
    for bit in range(64):
        hit = flipped(WORDS, bit)
        assert torch.equal(correct(hit, encode(hit) ^ encode(WORDS)), WORDS)


def test_an_error_in_a_check_bit_leaves_the_data() -> None:
    for bit in range(CHECK_BITS):
        syndrome = torch.full((6, 2), 1 << bit, dtype=torch.uint8)
        assert torch.equal(correct(WORDS, syndrome), WORDS)


def test_every_double_error_is_detected_and_read_as_zeros() -> None:
    pairs = [(a, b) for a in range(64) for b in range(a)]
    hit = torch.stack([flipped(WORDS, *pair) for pair in pairs])
    assert (correct(hit, encode(hit) ^ encode(WORDS)) == 0).all()


def test_three_errors_are_never_put_right() -> None:
    """An odd number of errors is taken for a single one, or is uncorrectable: the data is wrong either way."""
    hit = torch.stack([flipped(WORDS, a, b, c) for a, b, c in [(0, 1, 2), (5, 20, 40), (7, 33, 63), (16, 17, 48)]])
    read = correct(hit, encode(hit) ^ encode(WORDS))
    assert (read.unflatten(-1, (-1, 4)) != WORDS.unflatten(-1, (-1, 4))).any(-1).all()


def test_only_the_hit_code_word_is_touched() -> None:
    hit = WORDS.clone()
    hit[2, 5] ^= 0b11
    read = correct(hit, encode(hit) ^ encode(WORDS))
    assert (read[2, 4:] == 0).all()
    read[2, 4:] = WORDS[2, 4:]
    assert torch.equal(read, WORDS)


def test_a_head_size_that_does_not_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="head size of 6"):
        encode(WORDS[:, :6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_words_of_a_16_bit_type_go_there_and_back(dtype) -> None:
    words = torch.arange(2**16, dtype=torch.int32)
    values = from_words(words, dtype)
    assert torch.equal(stored_words(values), words)


def test_wide_values_are_stored_as_bf16_with_every_nan_kept_apart() -> None:
    x = torch.randn(1000, generator=GENERATOR)
    assert torch.equal(from_words(stored_words(x), torch.float32), x.bfloat16().float())
    words = torch.arange(2**16, dtype=torch.int32)
    assert torch.equal(stored_words(from_words(words, torch.float32)), words)


@pytest.mark.parametrize("seed", range(3))
def test_a_checksum_is_the_standard_crc(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, 2, 3, 4, 8, generator=generator) for _ in "kv")
    checksums = token_checksums(k, v)
    assert checksums.shape == (1, 2, 4)
    for layer in range(2):
        for t in range(4):
            words = torch.cat([stored_words(x[0, layer, :, t]).flatten() for x in (k, v)]).tolist()
            data = b"".join(word.to_bytes(2, "big") for word in words)
            assert checksums[0, layer, t] == binascii.crc_hqx(data, 0xFFFF)
