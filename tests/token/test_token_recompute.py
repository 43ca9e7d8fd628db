"""Recomputation as a defense: exact whatever was hit, for padded rows too, and by name."""

import pytest
import torch
from tiny import DOCUMENTS, tiny_tokenizer
from tiny_repair import base_of

from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.by_name import create_defense
from cachemedic.defenses.registry import Calibration
from cachemedic.evaluation.decoding import clean_pass, tokens_of


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
