"""The costs of families D and E: every operation does its work and has its row."""

import torch
from tiny import tiny_model

from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.repair.attach import protect
from cachemedic.studies.bench.augmented import augmented_cost, random_repair, wide_cache
from cachemedic.studies.bench.decode import decode, random_cache
from cachemedic.studies.bench.scrub import damage, scrub_cost


def test_every_operation_is_timed_against_its_reference():
    frame = scrub_cost(tiny_model(), length=48, hit=(0.0, 1.0), rounds=2)
    assert frame["operation"].tolist() == [
        "write the sketch in a prefill", "scrub, 0% hit", "scrub, 100% hit", "quick scrub, 0% hit",
        "quick scrub, 100% hit", "decode behind a scrubbed cache", "write the sketch of a decoded token",
    ]  # fmt: skip
    assert frame["reference"].tolist() == 5 * ["prefill"] + 2 * ["step"]
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
    wide = wide_cache(read, k, v)
    with torch.no_grad(), protect(model, read):
        expected = decode(model, unstack_cache(k[..., :length, :], v[..., :length, :]))
        for _ in range(2):
            torch.testing.assert_close(decode(model, wide), expected, rtol=1e-4, atol=1e-4)


def test_damage_hits_whole_pages_and_no_more_than_its_share():
    clean = torch.randn(2, 1, 2, 2, 160, 4)
    for share, pages in ((0.0, 0), (0.1, 1), (1.0, 10)):
        cache = unstack_cache(*clean.clone())
        damage(cache, share)
        changed = (torch.stack(stack_cache(cache)) != clean).all(-1)
        hit = changed[0, 0, 0, 0]
        assert (changed == hit).all(), "the same tokens of all heads, keys and values"
        assert hit.sum() == 16 * pages
        assert hit.view(10, 16).any(1).sum() == pages
