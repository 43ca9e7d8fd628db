"""What readers cost a decoding step: every reader decodes, and memory is counted in bytes."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from cachemedic.defenses.heuristics import BLIND
from cachemedic.studies.bench.decode import random_cache
from cachemedic.studies.bench.memory import peak_bytes
from cachemedic.studies.bench.readers import reading_cost


def test_peak_is_what_lives_at_once():
    x = torch.zeros(256)  # 1 KiB, made before: left out

    def two_at_once():
        y = x + 1
        y = y + 1  # the second exists before the first goes
        for _ in range(5):
            (y + 1).sum()

    def all_at_once():
        return [x + i for i in range(5)]

    def in_place_and_views():
        y = x.clone()
        y.add_(1)
        y.view(16, 16).mul_(2)
        x.add_(0)

    assert peak_bytes(two_at_once) == pytest.approx(2048, abs=8)
    assert peak_bytes(all_at_once) == 5 * 1024
    assert peak_bytes(in_place_and_views) == 1024
    assert peak_bytes(lambda: None) == 0


def test_every_reader_has_a_row_at_every_length():
    frame = reading_cost(tiny_model(), positions=(4, 16), families=("A", "B", "D", "E"), rounds=6, rank=2)
    readers = [*BLIND, "operator A", "operator B", "operator D", "operator E"]
    assert frame["reader"].tolist() == 2 * readers
    assert frame["positions"].tolist() == len(readers) * [4] + len(readers) * [16]
    assert (frame["milliseconds"] > 0).all()
    assert (frame["ratio_low"] <= frame["ratio"]).all()
    assert (frame[frame["reader"] == "none"]["ratio"] == 1).all()


def test_a_defence_holds_a_second_cache_and_an_operator_does_not():
    model, positions = tiny_model(), 64
    frame = reading_cost(model, (positions,), "A", rounds=1, rank=2).set_index("reader")["peak_mebibytes"]
    cache = sum(x.nbytes for x in random_cache(model, positions + 1)) / 2**20
    assert frame["smoothing"] > cache
    assert frame["operator A"] - frame["none"] < 0.1 * cache


def test_what_a_reader_keeps_beside_the_cache_counts():
    model, positions = tiny_model(), 64
    frame = reading_cost(model, (positions,), "DE", rounds=1, rank=2).set_index("reader")["peak_mebibytes"]
    beyond = (frame - frame["none"]) * 2**20 / positions
    ids_positions_and_hashes = 16 + 8 + 4 * 3
    assert beyond["operator D"] > ids_positions_and_hashes
    assert beyond["operator E"] > beyond["operator D"], "the codes"
