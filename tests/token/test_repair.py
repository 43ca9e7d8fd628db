"""Repair by operator and by budget: what is done with each token, and how much of it comes back."""

from dataclasses import replace

import pytest
import torch
from checked_caches import LENGTH, SLOTS, damaged, filled, numbers, shift, write
from joint_operators import joint_of, operator_of
from small_models import VOCABULARY, model_of, operator_for, padded_batch

from cachemedic.defenses.defense import CachedTokens
from cachemedic.token.cache import PAGE, SketchCache
from cachemedic.token.hashes import TokenHash
from cachemedic.token.joint import SINKS
from cachemedic.token.joint_operator import SketchAssisted
from cachemedic.token.token_repair import TokenRepair


def left(cache, before, slots):
    """The error of some tokens of row 0, over their variance."""
    error = sum(float((x - y)[0][:, slots].square().sum()) for x, y in zip(numbers(cache), before, strict=True))
    return error / sum(float(y[0][:, slots].var() * y[0][:, slots].numel()) for y in before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("method", ["restore", "estimate"])
def test_the_operator_tells_what_was_lost(name, method):
    model, cache, before = damaged(name)
    worst = left(cache, before, SLOTS)
    report = cache.repair(method)
    assert report.ways == {method: len(SLOTS)}
    assert not cache.check()
    assert left(cache, before, SLOTS[:2]) == 0  # the first positions are kept as they are
    assert left(cache, before, SLOTS[2:5]) < 0.02
    assert left(cache, before, SLOTS[5:]) < 0.6 * worst  # from its id alone
    sound = [slot for slot in range(LENGTH) if slot not in SLOTS]
    assert left(cache, before, sound) == 0


@pytest.mark.parametrize("method", ["restore", "estimate"])
def test_sound_layers_keep_every_bit(method):
    model, cache, before = damaged(slots=[])
    shift(cache, 0, [9, 20], layers=[1], by=3.0)
    worst = left(cache, before, [9, 20])
    cache.repair(method)
    assert left(cache, before, [9, 20]) < 1e-3 * worst
    for layer in (0, 2):
        assert torch.equal(cache.layers[layer].keys, before[2 * layer])
        assert torch.equal(cache.layers[layer].values, before[2 * layer + 1])


def agreeing(hasher, keys):
    """Keys [G, d] of one token with a huge number, whose short hash is that of `keys` by chance."""
    tried = keys.expand(1, 2**18, *keys.shape).transpose(1, 2).clone()
    tried[0, 0, :, 0] = 1e30
    tried[0, 0, :, 1] = torch.linspace(1, 2, 2**18)
    wanted, found = (hasher.parts(hasher.sums([x], [x]))[0, :, 0, 0] for x in (keys[None, :, None], tried))
    return tried[0, :, int((found == wanted).nonzero()[0])]


@pytest.mark.parametrize("method", ["restore", "estimate"])
def test_a_short_hash_that_agrees_by_chance_keeps_nothing_huge(method):
    model, cache, before = damaged(slots=[])
    ids, positions = cache.kept.ids[:1], cache.kept.positions[:1]
    keys, values = (torch.stack(before[side::2], 1)[:1] for side in (0, 1))
    repair = TokenRepair(model, cache.operator, method)
    kept = repair.write(CachedTokens(keys, values, ids, positions))
    shift(cache, 0, [20], layers=[1], by=3.0)
    cache.layers[0].keys[0, :, 20] = agreeing(cache.hasher, keys[0, 0, :, 20])
    keys[:, 0, :, 20] = agreeing(TokenHash(1, *keys.shape[2::2], keys.dtype, seed=0), keys[0, 0, :, 20])
    keys[:, 1, :, 20] = cache.layers[1].keys[:1, :, 20]
    cache.repair(method)
    assert left(cache, before, [20]) < 1
    found = repair.read(CachedTokens(keys, values, ids, positions), kept)
    assert float(found.k.abs().max()) < 1e3


def test_an_operator_without_ids_repairs_by_what_is_left():
    model, cache, before = damaged(share=None, slots=[], with_ids=False)
    shift(cache, 0, [9, 20, 35], by=1.0)
    worst = left(cache, before, [9, 20, 35])
    assert cache.repair("estimate").ways == {"estimate": 3}
    assert left(cache, before, [9, 20, 35]) < worst


def test_codes_do_not_depend_on_how_the_tokens_come():
    operator = operator_of("llama")
    model = model_of("llama")
    ids, mask = padded_batch(length=LENGTH)
    found = []
    for ends in ([LENGTH], [7, 21, LENGTH], range(1, LENGTH + 1)):
        cache = SketchCache(model, operator)
        write(model, cache, ids, mask, ends)
        assert cache.record.codes.shape == (3, LENGTH // PAGE * PAGE, operator.code.bytes_per_token)
        found.append(cache.record)
    for other in found[1:]:  # rounding of keys may move a number over the edge of a cell
        valid = (other.positions >= SINKS)[:, : other.codes.shape[1]]
        assert (other.codes != found[0].codes)[valid].double().mean() < 0.02
        torch.testing.assert_close(other.sinks, found[0].sinks, atol=1e-5, rtol=1e-5)


def test_codes_follow_a_cropped_cache():
    model, cache, _ = damaged(slots=[])
    cache.crop(-(LENGTH - 20))
    ids = torch.randint(1, VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([cache.record.valid.long(), torch.ones_like(ids)], 1)
    write(model, cache, torch.cat([cache.record.ids, ids], 1), mask, [50])
    assert cache.record.codes.shape[1] == 36
    before = numbers(cache)
    shift(cache, 0, [10, 30], by=3.0)
    cache.repair("restore")
    assert left(cache, before, [10, 30]) < 0.05


def test_an_operator_without_a_code_restores_from_the_ids():
    model, cache, before = damaged(share=None)
    worst = left(cache, before, SLOTS)
    assert cache.record.codes.numel() == 0
    cache.repair("restore")
    assert left(cache, before, SLOTS) < 0.6 * worst


@pytest.mark.parametrize("method", ["restore", "estimate"])
@pytest.mark.parametrize("kind", ["noise", "not finite"])
def test_codes_are_written_of_sound_tokens_only(method, kind):
    operator, (ids, mask) = operator_of("llama", 0.4), padded_batch(length=LENGTH)
    model = model_of("llama")
    cache, clean = SketchCache(model, operator), SketchCache(model, operator)
    write(model, cache, ids, mask, [2 * PAGE - 2])
    write(model, clean, ids, mask, [2 * PAGE - 2, 2 * PAGE - 1, 2 * PAGE])
    if kind == "noise":
        shift(cache, 0, [20, 24], by=3.0)
    else:
        cache.layers[1].keys[0, :, [20, 24], 0] = torch.nan
    write(model, cache, ids, mask, [2 * PAGE - 1, 2 * PAGE])
    assert cache.record.codes.shape[1] == PAGE  # a code of the second page would be one of the damage
    cache.repair("recompute")
    write(model, cache, ids, mask, [2 * PAGE + 1])
    assert torch.equal(cache.record.codes[0, :20], clean.record.codes[0, :20])
    assert (cache.record.codes[0] == clean.record.codes[0]).float().mean() > 0.9  # later ones had read the damage


def test_codes_beside_an_erased_token_are_read_by_what_they_were_written_with():
    operator, (ids, mask) = operator_of("llama", 0.4), padded_batch(length=LENGTH)
    model = model_of("llama")
    cache = SketchCache(model, operator)
    write(model, cache, ids, mask, [2 * PAGE - 6])
    shift(cache, 0, [20], by=3.0)
    cache.repair("erase")
    write(model, cache, ids, mask, [2 * PAGE])
    before = numbers(cache)
    shift(cache, 0, [21, 22, 23, 25], by=3.0)
    cache.repair("restore")
    assert left(cache, before, [21, 22, 23, 25]) < 0.02


@pytest.mark.parametrize("method", ["restore", "estimate"])
def test_what_the_operator_does_not_cover_is_not_taken_for_repaired(method):
    covers = replace(operator_of("llama", 0.4).config, layers=(0, 1))
    parameters = SketchAssisted.initial_parameters(covers, torch.Generator().manual_seed(0))
    partly = SketchAssisted(covers, {name: p[None] for name, p in parameters.items()})
    partly.set_joint(joint_of("llama", (0, 1)), {"restore": 0.1, "estimate": 0.1}, {})
    model, cache, _, _ = filled("llama", length=LENGTH, operator=partly)
    shift(cache, 0, [9], layers=[0, 1], by=3.0)
    shift(cache, 0, [20], layers=[0, 1, 2], by=3.0)
    report = cache.repair(method)
    assert report.ways == {method: 2}
    assert report.expected_kl is None
    assert report.not_covered == 1
    assert "1 tokens have damage in layers or numbers that the operator does not cover" in str(report)
    assert cache.check().tokens == [(0, 20)]
    assert cache.repair("recompute").not_covered == 0
    assert not cache.check()


def test_behind_an_erased_token_nothing_is_known_to_be_exact():
    model, cache, _, _ = filled(length=LENGTH)
    shift(cache, 0, [9], by=3.0)
    cache.repair("erase")
    shift(cache, 0, [20], by=3.0)
    assert cache.repair("recompute", budget=100.0).expected_kl is None


def test_a_model_that_counts_tokens_by_itself_is_given_all_of_them():
    model, operator = model_of("bart"), operator_of("bart")
    ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = SketchCache(model, operator)
    model(ids, past_key_values=cache)
    before = numbers(cache)
    shift(cache, 0, [20, 31], by=3.0)
    assert cache.repair("restore").ways == {"restore": 2}
    torch.testing.assert_close(numbers(cache)[0], before[0])  # the lowest layer, which the ids tell exactly


def test_reports_read_well():
    model, cache, before = damaged(restore=0.1)
    report = cache.repair("restore")
    for text in (str(report), report._repr_html_()):
        assert "6 tokens restored from what code and ids tell" in text
        assert "1, 3, 9, 20, 31, 35" in text
    assert "expected KL: 0.00526 nats" in str(report)
    assert str(cache.repair()).startswith("all 114 tokens are as they were last written or repaired")


def test_what_cannot_be_done_is_refused_before_any_work():
    model, cache, before = damaged()
    with pytest.raises(ValueError, match="did you mean 'restore'"):
        cache.repair("restored")
    with pytest.raises(ValueError, match="0 or more, not -1"):
        cache.repair(budget=-1)
    plain = filled(length=LENGTH)[1]
    with pytest.raises(ValueError, match=r"make it with SketchCache\(model, operator\)"):
        plain.repair("estimate")
    model.train()
    try:
        for method in ("auto", "recompute"):
            with pytest.raises(ValueError, match="training mode"):
                cache.repair(method)
    finally:
        model.eval()
    uncalibrated = operator_of("llama")
    uncalibrated.joint = None
    with pytest.raises(TypeError, match="operator of family D or E is needed, which repair stored tokens, not A"):
        SketchCache(model, operator_for(model))
    with pytest.raises(ValueError, match="gpt2"):
        SketchCache(model_of("gpt2"), operator_of("llama"))
    with pytest.raises(ValueError, match="knows no clean tokens yet"):
        SketchCache(model, uncalibrated)


def test_a_sliding_window_is_not_computed_again_and_the_report_says_why():
    model, cache, _, _ = filled("mistral")
    shift(cache, 0, [4])
    with pytest.raises(ValueError, match="attend to the last 6 tokens only, and the cache holds 12"):
        cache.repair("recompute")
    report = cache.repair()
    assert report.ways == {"erase": 1}
    assert "recompute: not possible: MistralForCausalLM has layers that attend to the last 6 tokens only" in str(report)
    model, cache, _, _ = filled("mistral", length=6)
    shift(cache, 0, [4])
    assert cache.repair().ways == {"recompute": 1}
