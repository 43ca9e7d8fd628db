"""What a check says of damage: tokens, layers, kinds, where a token came from."""

import pytest
import torch
from checked_caches import filled, shift, write
from small_models import VOCABULARY, model_of

from cachemedic.token.cache import SketchCache
from cachemedic.token.damage_kinds import KINDS

TOKENS = [5, 6, 9]


def both(cache, layers=range(3)):
    """The stored keys and values of some layers."""
    return [stored for layer in layers for stored in (cache.layers[layer].keys, cache.layers[layer].values)]


def not_finite(cache):
    cache.layers[1].values[0, 1, TOKENS, 2] = torch.inf
    cache.layers[1].values[0, 0, TOKENS, 3] = torch.nan


def zeros(cache):
    for stored in both(cache):
        stored[0, :, TOKENS, ::2] = 0


def page_of_another_row(cache):
    for stored in both(cache):
        stored[0, :, TOKENS] = stored[1, :, TOKENS]


def layers_swapped(cache):
    for side in ("keys", "values"):
        a, b = getattr(cache.layers[0], side), getattr(cache.layers[2], side)
        kept = a[0, :, TOKENS].clone()
        a[0, :, TOKENS] = b[0, :, TOKENS]
        b[0, :, TOKENS] = kept


def keys_for_values(cache):
    for layer in cache.layers:
        kept = layer.keys[0, :, TOKENS].clone()
        layer.keys[0, :, TOKENS] = layer.values[0, :, TOKENS]
        layer.values[0, :, TOKENS] = kept


def heads_permuted(cache):
    for stored in both(cache):
        stored[0, :, TOKENS] = stored[0, :, TOKENS].flip(0)


def rounded(cache):
    for stored in both(cache):
        x = stored[0, :, TOKENS]
        stored[0, :, TOKENS] = x.abs().mean() * x.sign()


def flips(cache):
    cache.layers[2].keys[0, 1, TOKENS, 4] *= 2.0**40


def noise(cache):
    shift(cache, 0, TOKENS)


DAMAGE = {
    "not finite": (not_finite, [1]),
    "zeros": (zeros, [0, 1, 2]),
    "another token": (page_of_another_row, [0, 1, 2]),
    "another layer": (layers_swapped, [0, 2]),
    "keys for values": (keys_for_values, [0, 1, 2]),
    "heads permuted": (heads_permuted, [0, 1, 2]),
    "rounded": (rounded, [0, 1, 2]),
    "flips": (flips, [2]),
    "other numbers": (noise, [0, 1, 2]),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_of_damage(kind, dtype):
    damage, layers = DAMAGE[kind]
    _, cache, _, _ = filled("qwen3", dtype=dtype)  # heads of 16 numbers
    damage(cache)
    report = cache.check()
    assert report.tokens == [(0, slot) for slot in TOKENS]
    assert report.layers == layers
    assert report.kinds == {kind: 3}
    assert report.kind(0, 5) == kind
    assert report.kind(0, 4) == "sound"
    assert f"{kind} (3)" in str(report)
    assert "tokens 5-6, 9" in str(report)
    assert f"<td>{kind} (3)</td>" in report._repr_html_()


def test_where_a_token_came_from():
    _, cache, _, mask = filled()
    kept = [stored.clone() for stored in both(cache)]
    for stored, old in zip(both(cache), kept, strict=True):
        stored[0, :, 4:6], stored[1, :, 8:10] = old[1, :, 8:10], old[0, :, 4:6]
    report = cache.check()
    assert report.kinds == {"another token": 4}
    assert report.origin[0, 5].tolist() == [1, 9]
    assert report.origin[1, 8].tolist() == [0, 4]
    assert report.origin[2, 8].tolist() == [-1, -1]


def test_a_stale_page_of_another_cache():
    model, old, _, _ = filled(seed=8)
    _, cache, _, _ = filled(seed=9)
    for stored, other in zip(both(cache), both(old), strict=True):
        stored[2, :, 6:8] = other[2, :, 6:8]
    assert "another token" not in cache.check().kinds
    assert cache.check([old]).kinds == {"another token": 2}
    with pytest.raises(ValueError, match="of one model, number format and seed"):
        cache.check([filled("gpt2")[1]])
    other_seed = SketchCache(model, seed=5)
    other_seed.begin(torch.ones(3, 1).long(), torch.zeros(3, 1).long())
    for layer in range(3):
        other_seed.update(*(torch.ones(3, 2, 1, 8) for _ in "kv"), layer)
    with pytest.raises(ValueError, match="of one model, number format and seed"):
        cache.check([other_seed])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_layer_read_in_another_layout(name):
    _, cache, _, mask = filled(name)
    keys = cache.layers[1].keys
    rows, heads, tokens, width = keys.shape
    keys.copy_(keys.transpose(1, 2).reshape(rows, heads, tokens, width))  # written as [T, G, d], read as [G, T, d]
    report = cache.check()
    assert report.layers == [1]
    assert set(report.kinds) == {"another layout"}
    assert report.parts[..., 1].any().item() is False


def test_a_whole_layer():
    _, cache, _, mask = filled()
    cache.layers[1].values.zero_()
    report = cache.check()
    assert report.whole_layers == [1]
    assert report.kinds == {"zeros": int(mask.sum())}
    assert "whole layers: 1" in str(report)
    assert "layers: 1, values" in str(report)


def test_padding_and_sound_tokens_are_not_reported():
    _, cache, _, mask = filled()
    for stored in both(cache):
        stored[2, :, 0] = 100.0
    report = cache.check()
    assert not report
    assert (report.layers, report.whole_layers, report.kinds) == ([], [], {})
    assert str(report) == f"all {int(mask.sum())} tokens are as they were last written or repaired"


def test_every_kind_has_a_test():
    assert {*DAMAGE, "sound", "another layout"} == set(KINDS)


def test_damaged_padding_makes_no_layer_whole():
    _, cache, _, mask = filled(length=12)
    padding = (mask == 0).nonzero()
    assert len(padding)
    for row, slot in padding.tolist():
        cache.layers[1].keys[row, :, slot] = torch.nan
    tokens = mask.nonzero()[: -len(padding)]
    for row, slot in tokens.tolist():
        shift(cache, row, [slot], layers=[1])
    assert cache.check().whole_layers == []
    for row, slot in mask.nonzero()[-len(padding) :].tolist():
        shift(cache, row, [slot], layers=[1])
    assert cache.check().whole_layers == [1]


def test_zeros_are_zeros_where_others_were_erased():
    _, cache, _, _ = filled()
    shift(cache, 0, [5])
    cache.repair("erase")
    for stored in both(cache):
        stored[0, :, 8] = 0
    assert cache.check().kinds == {"zeros": 1}


def test_padding_does_not_hide_another_layout():
    model = model_of("llama")
    ids = torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) >= 24).long().expand(2, -1)
    cache = SketchCache(model)
    write(model, cache, ids * mask, mask, [40])
    keys = cache.layers[1].keys
    keys.copy_(keys.transpose(1, 2).reshape(keys.shape))  # written as [T, G, d], read as [G, T, d]
    assert set(cache.check().kinds) == {"another layout"}


def test_a_cache_of_padding_alone_can_be_checked():
    _, cache, _, _ = filled()
    for row in range(3):
        shift(cache, row, list(range(12)))
    cache.repair("erase")
    cache.layers[0].keys[0, :, 3] = torch.nan
    assert cache.check().kinds == {"not finite": 1}
