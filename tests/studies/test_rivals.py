"""What notebook 24 adds to the defenses: check bits that are hit, D with hashes, differences to E, and names."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny import DOCUMENTS
from tiny_repair import LAYERS, base_of, calibrated

from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.memory_codes import GolayEcc, SecdedEcc
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.evaluation.experiments import TYPES
from cachemedic.models.shape import ModelShape
from cachemedic.studies.computing.rivals import (
    EXAMPLES,
    SEVERITIES,
    CheckBitsHit,
    Hashed,
    beside_reference,
    flipped,
    met,
    of_share,
)
from cachemedic.studies.drawing.readers import head_of, numbered_label
from cachemedic.token.token_repair import TokenRepair

KEYS = ["type", "seed", "example"]


@pytest.fixture(scope="module")
def clean():
    base = base_of("llama")
    task = perplexity_task(base.tokenizer, DOCUMENTS, (0,), 4, prefix=24, scored=2)
    return clean_pass(base.model, task).tokens(task)


@pytest.mark.parametrize(("dtype", "width"), [(torch.uint8, 8), (torch.int16, 12)])
def test_check_bits_flip_as_often_as_asked_and_no_other_bit(dtype, width):
    checks = torch.zeros(50, 400, dtype=dtype)
    hit = flipped(checks, 0.05, "k")
    of_bits = torch.stack([hit.int() >> bit & 1 for bit in range(16)]).float().mean((1, 2))
    assert of_bits[:width].tolist() == pytest.approx([0.05] * width, abs=0.01)
    assert (of_bits[width:] == 0).all()
    assert torch.equal(hit, flipped(checks, 0.05, "k"))
    assert not torch.equal(hit, flipped(checks, 0.05, "v"))


@pytest.mark.parametrize("kind", [SecdedEcc, GolayEcc])
def test_few_flips_of_check_bits_do_no_harm(clean, kind):
    shape = ModelShape.of(base_of("llama").config)
    stored = replace(clean, k=clean.k.bfloat16().float(), v=clean.v.bfloat16().float())
    code = CheckBitsHit(kind(shape, "in_page"), 1e-3)
    kept = code.write(stored)
    assert not torch.equal(kept[0], code.inner.write(stored)[0])
    read = code.read(stored, kept)
    assert (read.k != stored.k).float().mean() < 1e-3
    assert code.bytes_per_token == code.inner.bytes_per_token


def test_d_with_hashes_leaves_what_is_sound(clean):
    base = base_of("llama")
    plain = TokenRepair(base.model, calibrated("llama", "D"))
    hashed = Hashed(plain)
    kept = hashed.write(clean)
    k = clean.k.clone()
    k[:, 1, :, 9] += 1
    read, alone = hashed.read(replace(clean, k=k), kept), plain.read(replace(clean, k=k), None)
    changed = (read.k != clean.k).any(-1).any(2).any(0)
    assert changed.nonzero().tolist() == [[1, 9]], "layer and token"
    assert not torch.equal(read.k, k)
    assert (alone.k != clean.k).sum() > (read.k != clean.k).sum()
    assert hashed.bytes_per_token == 8 + 4 * len(LAYERS)


def rows_of(**kl: list[float]) -> pd.DataFrame:
    frames = [
        pd.DataFrame({"reader": name, "type": "noise", "seed": [0, 0, 1], "example": [0, 1, 0], "kl": found})
        for name, found in kl.items()
    ]
    return pd.concat(frames, ignore_index=True)


def test_differences_are_of_the_same_text():
    grid = rows_of(E=[1.0, 2.0, 3.0], none=[5.0, 2.5, 3.0])
    found = beside_reference(grid.sample(frac=1, random_state=0), KEYS).sort_values(["reader", "seed", "example"])
    assert found.loc[found.reader == "none", "more"].tolist() == [4.0, 0.5, 0.0]
    assert (found.loc[found.reader == "E", "more"] == 0).all()
    with pytest.raises(ValueError, match="not every reader has read what E has read"):
        beside_reference(grid.drop(index=0), KEYS)
    with pytest.raises(ValueError, match="not every reader"):
        beside_reference(grid.drop(index=4), KEYS)


def test_what_takes_from_another_text_meets_two_of_a_seed_or_more():
    task = perplexity_task(base_of("llama").tokenizer, DOCUMENTS, (0, 1), EXAMPLES, prefix=20, scored=2)
    counts = {(kind, s): Counter(task.seeds[rows].tolist()) for kind, s, rows in met(task, SEVERITIES)}
    assert set(counts) == {(kind, s) for kind in TYPES for s in SEVERITIES}
    for (kind, _), found in counts.items():
        assert found == dict.fromkeys((0, 1), 3 if kind == "contiguous_overwrite" else 1)


def test_readers_that_differ_in_a_number_share_a_head():
    assert of_share("E", 1 / 64) == "E, 1/64"
    assert head_of("E, 1/64") == head_of("E") == "E"
    assert head_of("E, code alone, 1/32") == "E, code alone"
    assert head_of("code, no ids, 1/128") == "code, no ids"
    assert head_of("shadow_4bit, group 64") == "shadow_4bit"
    assert head_of("D, hashes") == "D, hashes"
    assert numbered_label("shadow_4bit, group 64") == "4-bit copy, group 64"
    assert numbered_label("golay_ecc") == "Golay code"
