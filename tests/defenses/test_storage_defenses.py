"""Defenses with protected storage: nothing on clean caches, what each undoes, and what it costs."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig

from cachemedic.core.quantise import quantise_in_groups
from cachemedic.defenses.clean_ranges import PLAUSIBLE
from cachemedic.defenses.defense import CachedTokens, Defense, cache_bytes_per_token
from cachemedic.defenses.ecc import from_words, stored_words
from cachemedic.defenses.memory_codes import GolayEcc, SecdedEcc
from cachemedic.defenses.registry import Calibration
from cachemedic.defenses.shadows import GROUP, GroupQuantisedShadow, LowRankShadow
from cachemedic.defenses.storage_defenses import ChecksumErase, ChecksumRecompute, storage_defenses
from cachemedic.models.shape import ModelShape

N, L, G, T, D = 4, 4, 2, 40, 16
SHAPE = ModelShape("gpt2", L, G, G, D)
VALID = torch.arange(T) >= torch.tensor([0, 3, 0, 1])[:, None]


def clean_cache(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache that lies near 4 of the 32 directions of a layer, with a sink at the first position."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, L, 4, G * D, generator=torch.Generator().manual_seed(9))
    x = torch.randn(2, N, L, T, 4, generator=generator) @ basis[:, None]
    x = x + 0.05 * torch.randn(x.shape, generator=generator)
    x[..., 0, :] += 30.0
    k, v = x.unflatten(-1, (G, D)).movedim(-2, 3)
    return k.contiguous(), v.contiguous()


def tokens(k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor = VALID) -> CachedTokens:
    return CachedTokens.behind_padding(k, v, torch.zeros(valid.shape, dtype=torch.long), valid)


def defenses_of(config: PreTrainedConfig, clean: CachedTokens) -> dict[str, Defense]:
    with torch.device("meta"):  # its shape is all that is used
        model = GPT2LMHeadModel(config)
    return storage_defenses(Calibration(model, clean))


K, V = clean_cache()
CLEAN = tokens(K, V)
CONFIG = GPT2Config(n_layer=L, n_head=G, n_embd=G * D, vocab_size=8, n_positions=T)
STORAGE = defenses_of(CONFIG, tokens(*clean_cache(1), torch.ones(N, T, dtype=torch.bool)))
STORAGE |= {"golay_ecc": GolayEcc(SHAPE), "golay_ecc_in_page": GolayEcc(SHAPE, "in_page")}


def read(defense: Defense, k: torch.Tensor, v: torch.Tensor) -> CachedTokens:
    return defense.read(tokens(k, v), defense.write(CLEAN))


def flip(x: torch.Tensor, where: tuple[int, ...], bits: int) -> torch.Tensor:
    """x with bits of the stored word at one place flipped."""
    words = stored_words(x)
    words[where] ^= bits
    result = x.clone()
    result[where] = from_words(words[where], x.dtype)
    return result


@pytest.mark.parametrize("name", [name for name in STORAGE if name != "secded_ecc_restricted"])
def test_a_clean_cache_is_read_bit_for_bit_and_no_input_is_changed(name) -> None:
    defended = read(STORAGE[name], K, V)
    assert torch.equal(defended.k, K)
    assert torch.equal(defended.v, V)
    assert defended.readable is None or defended.readable.all()
    assert torch.equal(K, clean_cache()[0])


@pytest.mark.parametrize("name", STORAGE)
def test_wild_values_never_reach_attention(name) -> None:
    k, v = K.clone(), V.clone()
    k[0, 1, 0, 5], v[0, 1, 0, 6], k[1, 3, 1, 7, 2], v[2, 0, 1, 8, 3] = math.nan, math.inf, -math.inf, 1e38
    before = k.clone(), v.clone()
    defended = read(STORAGE[name], k, v)
    for x in (defended.k, defended.v):
        assert (x.abs() <= PLAUSIBLE).all()
    torch.testing.assert_close((k, v), before, equal_nan=True, rtol=0, atol=0)


def test_ecc_corrects_a_flip_in_every_word_and_zeroes_a_double_one() -> None:
    words = stored_words(K)
    words[..., ::4] ^= 1 << 14  # an exponent bit in each code word
    hit = from_words(words, K.dtype)
    assert not hit.isfinite().all(), "some became NaN"
    assert torch.equal(read(STORAGE["secded_ecc"], hit, V).k, K.bfloat16().float().where(hit != K, K))
    words[..., 1::4] ^= 1
    assert (read(STORAGE["secded_ecc"], from_words(words, K.dtype), V).k == 0).all()


def test_ecc_passes_all_but_the_hit_value_at_full_precision() -> None:
    where = (1, 2, 0, 9, 6)
    corrected = read(STORAGE["secded_ecc"], flip(K, where, 1 << 9), V)
    expected = K.clone()
    expected[where] = K[where].bfloat16().float()
    assert torch.equal(corrected.k, expected)
    assert torch.equal(corrected.v, V)


@pytest.mark.parametrize("name", ["secded_ecc", "golay_ecc"])
def test_check_bits_in_the_page_come_along_with_an_overwrite_but_not_with_flips(name) -> None:
    k, v = K.clone(), V.clone()
    k[:, :, :, 8:24], v[:, :, :, 8:24] = K.roll(1, 0)[:, :, :, 8:24], V.roll(1, 0)[:, :, :, 8:24]
    in_page, protected = STORAGE[f"{name}_in_page"], STORAGE[name]
    assert torch.equal(read(in_page, k, v).k, k), "valid code words"
    noticed = read(protected, k, v)
    assert (noticed.k[:, :, :, 8:24] != k[:, :, :, 8:24]).float().mean() > 0.5
    assert torch.equal(noticed.k[:, :, :, 24:], K[:, :, :, 24:])
    where = (0, 0, 0, 3, 1)
    hit = flip(K, where, 1 << 12)
    assert torch.equal(read(in_page, hit, V).k, read(protected, hit, V).k)
    with pytest.raises(ValueError, match="'in_pages'.*did you mean 'in_page'"):
        SecdedEcc(SHAPE, "in_pages")


def test_the_golay_code_puts_right_three_flips_where_secded_fails() -> None:
    hit = flip(K, (1, 2, 0, 9, 6), 0b111 << 4)
    expected = K.clone()
    expected[1, 2, 0, 9, 6] = K[1, 2, 0, 9, 6].bfloat16().float()
    assert torch.equal(read(STORAGE["golay_ecc"], hit, V).k, expected)
    assert not torch.equal(read(STORAGE["secded_ecc"], hit, V).k, expected)
    four = read(STORAGE["golay_ecc"], flip(K, (1, 2, 0, 9, 6), 0b1111 << 4), V)
    assert four.k[1, 2, 0, 9, 6] == 0


def test_a_restricted_code_is_the_code_and_then_the_range() -> None:
    restricted = STORAGE["secded_ecc_restricted"]
    k = flip(K, (0, 0, 0, 3, 1), 1 << 12).clone()
    k[1, 2] *= 50
    expected = restricted.restriction.read(read(STORAGE["secded_ecc_in_page"], k, V), None)
    defended = read(restricted, k, V)
    assert torch.equal(defended.k, expected.k)
    assert torch.equal(defended.v, expected.v)
    assert (defended.k[1, 2].abs() < 50).all()


def damaged_cache() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One stored bit flipped in some tokens of some layers, and which [N, L, T]."""
    k, v, damaged = K, V, torch.zeros(N, L, T, dtype=torch.bool)
    for n, (layer, t) in enumerate([(0, 5), (1, 20), (3, 39), (3, 12)]):
        k, damaged[n, layer, t] = flip(k, (n, layer, 1, t, n), 1 << n), True
    v, damaged[0, 2, 33] = flip(v, (0, 2, 0, 33, 7), 1 << 15), True
    return k, v, damaged


@pytest.mark.parametrize("name", [name for name in STORAGE if name.startswith(("shadow", "low_rank"))])
def test_shadows_replace_damaged_tokens_and_no_other(name) -> None:
    k, v, damaged = damaged_cache()
    copy_k, copy_v = STORAGE[name].copy(CLEAN)
    defended = read(STORAGE[name], k, v)
    hit = damaged[:, :, None, :, None]
    assert torch.equal(defended.k, torch.where(hit, copy_k, K))
    assert torch.equal(defended.v, torch.where(hit, copy_v, V))
    everything = read(STORAGE[name], K + 1, V + 1)
    torch.testing.assert_close(everything.k, copy_k)


def test_erasure_drops_the_positions_that_are_damaged_in_any_layer() -> None:
    k, v, damaged = damaged_cache()
    defended = read(ChecksumErase(SHAPE), k, v)
    assert torch.equal(defended.readable, ~damaged.any(1))
    assert torch.equal(defended.k.movedim(3, 2)[~damaged], K.movedim(3, 2)[~damaged])
    assert (defended.v.movedim(3, 2)[damaged] == 0).all()


@pytest.mark.parametrize("layers", range(L))
def test_recomputing_j_layers_restores_layers_0_to_j(layers) -> None:
    k, v, damaged = damaged_cache()
    defense = ChecksumRecompute(SHAPE, layers)
    defended = read(defense, k, v)
    assert torch.equal(defended.k[:, : layers + 1], K[:, : layers + 1])
    assert torch.equal(defended.v[:, : layers + 1], V[:, : layers + 1])
    assert torch.equal(defended.k[:, layers + 1 :], k[:, layers + 1 :])
    assert defense.prefill_share == layers / L


def test_recomputation_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"layers {L} is out of range: 0 to {L - 1}"):
        ChecksumRecompute(SHAPE, L)


def slow_group(values: list[float], bits: int) -> list[float]:
    """One group, value by value."""
    x = torch.tensor(values)
    low, high = (x.min(), x.max()) if bits > 1 else (x.mean() - (x - x.mean()).abs().mean(), None)
    if high is None:
        high = 2 * x.mean() - low
    zero = low.bfloat16().float()
    scale = ((high - zero) / (2**bits - 1)).bfloat16().float()
    levels = [zero + scale * code for code in range(2**bits)]
    return [float(min(levels, key=lambda level: abs(level - value))) for value in x]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_group_quantisation_picks_the_nearest_level_of_each_group(bits) -> None:
    k, v = STORAGE[f"shadow_{bits}bit"].copy(CLEAN)
    n, layer, head, channel = 1, 2, 1, 5  # a row with padding
    own = K[n, layer, head, :, channel]
    for part in (slice(3, GROUP), slice(GROUP, T)):
        expected = torch.tensor(slow_group(own[part].tolist(), bits))
        torch.testing.assert_close(k[n, layer, head, part, channel], expected)
    token = V[n, layer, :, 7].flatten()  # all G * D = 32 channels are one group
    torch.testing.assert_close(v[n, layer, :, 7].flatten(), torch.tensor(slow_group(token.tolist(), bits)))


def test_groups_of_a_copy_have_the_size_that_is_asked_for() -> None:
    shadow = GroupQuantisedShadow(SHAPE, 2, 8)
    copy_k, _ = shadow.copy(CLEAN)
    expected = torch.tensor(slow_group(K[0, 1, 0, 8:16, 3].tolist(), 2))
    torch.testing.assert_close(copy_k[0, 1, 0, 8:16, 3], expected)
    assert shadow.bytes_per_token == L * (16 + 2 * G * D * 2 + 2 * 32 * G * D // 8) / 8
    with pytest.raises(ValueError, match="group 0 is out of range"):
        GroupQuantisedShadow(SHAPE, 2, 0)


def test_padding_belongs_to_no_group() -> None:
    present = torch.arange(GROUP) >= 4
    x = torch.randn(GROUP, generator=torch.Generator().manual_seed(0))
    wild = torch.where(present, x, 1e6)
    read, plain = (quantise_in_groups(y, present, 2, GROUP) for y in (wild, x))
    assert torch.equal(read[4:], plain[4:])
    assert torch.equal(read[:4], wild[:4])
    with pytest.raises(ValueError, match="bits 9 is out of range"):
        GroupQuantisedShadow(SHAPE, 9)


def test_finer_shadows_are_closer() -> None:
    errors = [float((STORAGE[f"shadow_{bits}bit"].copy(CLEAN)[1] - V).norm()) for bits in (1, 2, 4)]
    assert errors[0] > 1.3 * errors[1]
    assert errors[1] > 3 * errors[2], "5 times finer"


def test_a_low_rank_shadow_holds_what_lies_on_the_principal_directions() -> None:
    valid = torch.ones(N, T, dtype=torch.bool)
    shadow = LowRankShadow.fit(tokens(*clean_cache(1), valid), SHAPE, 5 / 32)
    assert shadow.basis_k.shape == (L, G * D, 4)
    eye = torch.eye(4).expand(L, 4, 4)
    torch.testing.assert_close(shadow.basis_k.mT @ shadow.basis_k, eye, atol=1e-4, rtol=0)
    copy_k, _ = shadow.copy(tokens(K, V, valid))
    others = slice(1, None)
    assert (copy_k - K)[..., others, :].norm() < 0.05 * K[..., others, :].norm()
    # a plain projection of one token
    token = K[2, 1, :, 9].flatten()
    centred = token - shadow.mean_k[0, 1]
    expected = shadow.mean_k[0, 1] + shadow.basis_k[1] @ (shadow.basis_k[1].T @ centred).bfloat16().float()
    torch.testing.assert_close(copy_k[2, 1, :, 9].flatten(), expected, atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match="does not pay for one direction"):
        LowRankShadow.fit(CLEAN, SHAPE, 0.01)


def test_bytes_are_counted() -> None:
    k, v = torch.randn(2, 2, 12, 4, 8, 32, generator=torch.Generator().manual_seed(0))
    config = GPT2Config(n_layer=12, n_head=4, n_embd=128, vocab_size=8, n_positions=8)
    found = defenses_of(config, tokens(k, v, torch.ones(2, 8, dtype=torch.bool)))
    whole = cache_bytes_per_token(ModelShape.of(config))
    shares = {name: defense.bytes_per_token / whole for name, defense in found.items()}
    checksum = 16 / (16 * 2 * 4 * 32)
    assert GolayEcc(SHAPE).bytes_per_token == 2 * L * G * 22 * 12 / 8, "22 code words for 16 values of 16 bits"
    assert shares == pytest.approx(
        {
            "secded_ecc": 1 / 8,
            "secded_ecc_in_page": 1 / 8,
            "secded_ecc_restricted": 1 / 8,
            "checksum_erase": checksum,
            "checksum_recompute_2": checksum,
            "shadow_1bit": 2 / 16 + checksum,
            "shadow_2bit": 3 / 16 + checksum,
            "shadow_4bit": 5 / 16 + checksum,
            "low_rank_shadow": 15 / 128 + checksum,  # 16 directions of 128 would leave nothing for the checksum
            "low_rank_shadow_6pct": 7 / 128 + checksum,
            "low_rank_shadow_3pct": 3 / 128 + checksum,
        }
    )
