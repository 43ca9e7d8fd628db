"""The costs of families D and E: every operation does its work and has its row."""

import torch
from tiny import tiny_model
from transformers.cache_utils import Cache

from cachemedic.attention import protect
from cachemedic.bench.augmented import RepeatableWideLayer, augmented_cost, random_repair
from cachemedic.bench.decode import decode
from cachemedic.bench.readers import random_cache
from cachemedic.bench.scrub import damaged, scrub_cost
from cachemedic.cache import unstack_cache


def test_every_operation_is_timed_against_its_reference():
    frame = scrub_cost(tiny_model(), length=48, hit=(0.0, 1.0), rounds=2)
    assert frame["operation"].tolist() == [
        "write the sketch in a prefill", "scrub, 0% hit", "scrub, 100% hit", "decode behind a scrubbed cache",
        "write the sketch of a decoded token",
    ]  # fmt: skip
    assert frame["reference"].tolist() == 3 * ["prefill"] + 2 * ["step"]
    assert (frame[["milliseconds", "reference_milliseconds", "ratio"]] > 0).all(axis=None)


def test_augmented_reads_have_a_row_for_every_length_rank_and_number_of_layers():
    frame = augmented_cost(tiny_model(), positions=(4, 16), few=(1,), ranks=(2, 8), rounds=2)
    assert frame["positions"].tolist() == 4 * [4] + 4 * [16]
    assert frame["rank"].tolist() == 2 * [2, 2, 8, 8]
    assert frame["layers"].tolist() == 4 * [1, 3]
    assert (frame["ratio"] > 0).all()


def test_a_repeated_wide_step_reads_what_a_growing_cache_holds():
    model, length = tiny_model("llama"), 12
    k, v = random_cache(model, length + 1)
    read = random_repair(model, range(3), 3, length)
    wide = Cache([RepeatableWideLayer(x.keys, x.values) for x in read.cache(k, v).layers])
    with torch.no_grad(), protect(model, read):
        expected = decode(model, unstack_cache(k[..., :length, :], v[..., :length, :]))
        for _ in range(2):
            torch.testing.assert_close(decode(model, wide), expected, rtol=1e-4, atol=1e-4)


def test_damage_hits_whole_pages_and_no_more_than_its_share():
    x, numbers = torch.randn(1, 2, 2, 160, 4), torch.Generator().manual_seed(0)
    for share, pages in ((0.0, 0), (0.1, 1), (1.0, 10)):
        hit = (damaged(x, share, numbers) != x).any(-1).any(2).any(1)[0]
        assert hit.sum() == 16 * pages
        assert hit.view(10, 16).any(1).sum() == pages
