"""Recomputation as a defense: exact whatever was hit, for padded rows too, and by name."""

from dataclasses import replace

import pytest
import torch
from tiny import DOCUMENTS, tiny_model, tiny_tokenizer
from tiny_repair import base_of

from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.by_name import create_defense
from cachemedic.defenses.registry import Calibration
from cachemedic.evaluation.decoding import clean_pass, tokens_of
from cachemedic.token.token_recompute import HiddenStates


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_changed_tokens_are_computed_again_and_others_keep_every_bit(architecture):
    model = base_of(architecture).model
    task = perplexity_task(tiny_tokenizer(), DOCUMENTS, (3, 7), n=2, prefix=20, scored=3)
    task.prefix_mask[1, :6] = False
    clean = clean_pass(model, task)
    written = clean.tokens(task)
    defense = create_defense("recompute", Calibration(model, written))
    kept = defense.write(written)
    hit = torch.zeros(4, 20, dtype=torch.bool)
    hit[0, 3], hit[1, 8:12], hit[2] = True, True, True
    k, v = (torch.where(hit[:, None, None, :, None], torch.nan, x) for x in (clean.k, clean.v))
    read = defense.read(tokens_of(task, k, v), kept)
    for found, sound, damaged in ((read.k, clean.k, k), (read.v, clean.v, v)):
        real = task.prefix_mask[:, None, None, :, None].expand_as(found)
        torch.testing.assert_close(found[real], sound[real], rtol=1e-5, atol=1e-5)
        untouched = (real & ~hit[:, None, None, :, None]).expand_as(found)
        assert torch.equal(found[untouched], sound[untouched])
        assert damaged[0, :, :, 3].isnan().all(), "the damaged cache stays as it is"
    assert defense.bytes_per_token == 8
    assert defense.prefill_share == 1


def bank_of(architecture, dtype=torch.float32):
    model = tiny_model(architecture).to(dtype)
    task = perplexity_task(tiny_tokenizer(), DOCUMENTS, (3, 7), n=2, prefix=20, scored=3)
    task.prefix_mask[1, :6] = False
    return model, task, clean_pass(model, task)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["hidden_states", "hidden_states_8bit", "hidden_states_all"])
def test_tokens_are_computed_from_kept_states(architecture, name):
    model, task, clean = bank_of(architecture, torch.bfloat16)
    written = clean.tokens(task)
    defense = create_defense(name, Calibration(model, written))
    kept = defense.write(written)
    hit = torch.zeros(4, 20, dtype=torch.bool)
    hit[0, 3], hit[1, 8:12], hit[2], hit[3, 5] = True, True, True, True
    at = hit[:, None, None, :, None]
    read = defense.read(tokens_of(task, *(torch.where(at, torch.nan, x) for x in (clean.k, clean.v))), kept)
    recomputed = create_defense("recompute", Calibration(model, written))
    exact = recomputed.read(
        tokens_of(task, *(torch.where(at, torch.nan, x) for x in (clean.k, clean.v))), recomputed.write(written)
    )
    for found, sound, from_ids in ((read.k, clean.k, exact.k), (read.v, clean.v, exact.v)):
        real = task.prefix_mask[:, None, None, :, None]
        assert torch.equal(found[(real & ~at).expand_as(found)], sound[(real & ~at).expand_as(found)])
        error = (found - sound).float()[(real & at).expand_as(found)].norm()
        rounding = (from_ids - sound).float()[(real & at).expand_as(found)].norm()
        size = sound.float()[(real & at).expand_as(found)].norm()
        assert error <= (rounding + 1e-2 * size if name.endswith("8bit") else 1.1 * rounding + 1e-3 * size)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_goes_into_a_layer_does_not_depend_on_the_ids_where_it_is_kept():
    """Of a lost id the layers below are wrong, and those from the kept state on are right."""
    model, task, clean = bank_of("llama")
    written = clean.tokens(task)
    defense = HiddenStates(model, (2,))
    kept = defense.write(written)
    at = torch.zeros(20, dtype=torch.bool).index_fill(0, torch.tensor([9]), True)[None, None, None, :, None]
    lost = tokens_of(task, torch.where(at, 0.0, clean.k), torch.where(at, 0.0, clean.v))
    other = lost.ids.index_fill(1, torch.tensor([9]), 123)
    assert (other != lost.ids).any(1).all()
    read = defense.read(replace(lost, ids=other), kept)
    torch.testing.assert_close(read.k[:, 2], clean.k[:, 2], rtol=0.02, atol=0.02)
    assert (read.k[0, 0, :, 9] - clean.k[0, 0, :, 9]).abs().max() > 0.1


def test_bytes_and_time_of_kept_states():
    model = tiny_model("llama")  # 3 layers; 32 wide: projections of 2 x 16 x 32, layers of 3,072 + 4,608 and norms
    weights = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    projections = 2 * 32 * 16 / weights
    one, eight, every = HiddenStates(model, (1,)), HiddenStates(model, (2,), 8), HiddenStates(model, (1, 2))
    assert (one.bytes_per_token, eight.bytes_per_token, every.bytes_per_token) == (8 + 64, 8 + 32 + 4, 8 + 128)
    assert one.prefill_share == pytest.approx((1 + 2 * projections) / 3)
    assert every.prefill_share == pytest.approx(projections)
    assert HiddenStates(model, (1, 1)).bytes_per_token == one.bytes_per_token


@pytest.mark.parametrize(
    ("layers", "bits", "message"),
    [
        ((), 16, "layers \\[\\] are out of range: one or more from 1 to 2"),
        ((0,), 16, "layers \\[0\\] are out of range"),
        ((1, 3), 16, "layers \\[1, 3\\] are out of range"),
        ((1,), 4, "bits 4 is out of range: 8 or 16"),
    ],
)
def test_states_that_cannot_be_kept_are_an_error(layers, bits, message):
    with pytest.raises(ValueError, match=message):
        HiddenStates(tiny_model("llama"), layers, bits)
