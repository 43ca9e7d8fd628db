"""The benchmarks: all rungs do the same work, and so do all readers of a decoding step."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from small_models import operator_for, shaken
from tiny import tiny_model
from tiny_training import CONFIG, parameters, tiny_bank, tiny_base
from transformers import DynamicCache

from cachemedic.repair.attach import protect
from cachemedic.studies.bench import decode, training
from cachemedic.studies.bench.materialised import materialised
from cachemedic.studies.bench.timing import interleave, median_ratio
from cachemedic.training.bank import BankConfig
from cachemedic.training.draws import Draw

SWEEP = replace(CONFIG, layers=(1, 2), corrupted_layers="protected", bank=BankConfig(samples=40, prefix=10, decoded=1))


@pytest.fixture(scope="module")
def short_base():
    return tiny_base()


@pytest.fixture(scope="module")
def short_bank(short_base, tmp_path_factory):
    return tiny_bank(short_base, SWEEP.bank, tmp_path_factory.mktemp("bank"))


@pytest.mark.usefixtures("_calibrated")
@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_every_rung_computes_the_same_step(short_base, short_bank, family):
    rungs = [replace(rung, batch=6, run_axis=True) for rung in training.LADDER]
    trainers = [training.trainer_of(rung, short_base, replace(SWEEP, family=family), short_bank) for rung in rungs]
    start = shaken(trainers[0].operator, 0.1).state_dict()
    drawn = trainers[0].draw(0)  # of all layers; only those above the first protected one are hit
    assert torch.equal(drawn.keys[:, :, 0], short_bank.keys[drawn.rows][:, :, 0])
    results = []
    for rung, trainer in zip(rungs, trainers, strict=True):
        trainer.operator.load_state_dict(start)
        if not rung.bank:
            rows = drawn.rows.flatten()
            taught = training.teacher_pass(short_base, short_bank.ids[rows], short_bank.prefix)
            torch.testing.assert_close(taught.keys, short_bank.keys[rows])
            torch.testing.assert_close(taught.values, short_bank.values[rows])
            torch.testing.assert_close(taught.logits, short_bank.logits[rows])
        above = Draw(drawn.rows, drawn.keys[:, :, trainer.first :], drawn.values[:, :, trainer.first :], drawn.events)
        outputs = trainer.forward(above)
        losses = trainer.objective(outputs)
        losses["loss"].sum().backward()
        results.append((losses, [p.grad for p in trainer.operator.parameters()]))
    assert (results[0][0]["identity"] > 0).any()
    assert (results[0][0]["contraction"] > 0).any()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("_calibrated")
def test_the_ladder_times_every_rung(short_base, short_bank):
    frame = training.ladder(short_base, short_bank, SWEEP, rounds=2, seconds=0.0)
    assert frame["rung"].tolist() == [rung.name for rung in training.LADDER]
    assert frame["runs"].tolist() == [1, 1, 1, 1, 4, 4]
    assert (frame[["samples_per_second", "gain", "total"]] > 0).all(axis=None)
    assert frame["total"][0] == 1
    whole = replace(SWEEP, layers=(0, 1, 2), corrupted_layers="all")
    assert len(training.ladder(short_base, short_bank, whole, rounds=1, seconds=0.0)) == len(training.LADDER) - 1


@pytest.mark.usefixtures("_calibrated")
def test_the_parts_of_a_step_add_up(short_base, short_bank):
    trainer = training.trainer_of(training.LADDER[-1], short_base, SWEEP, short_bank)
    before = parameters(trainer.operator)
    parts = training.step_parts(trainer, steps=2)
    assert parts["share"].sum() == pytest.approx(1)
    assert (parts["milliseconds"] > 0).all()  # every part is found by its name
    assert not torch.equal(before["u_k"], trainer.operator.u_k)


def test_a_repeatable_cache_gives_the_step_of_a_growing_one():
    model = tiny_model()
    repeatable = decode.repeatable_cache(model, 12)
    growing = DynamicCache()
    for index, layer in enumerate(repeatable.layers):
        growing.update(layer.keys[:, :, :-1], layer.values[:, :, :-1], index)
    expected = decode.decode(model, growing)
    for _ in range(2):
        torch.testing.assert_close(decode.decode(model, repeatable), expected)
    assert repeatable.get_seq_length() == 12


@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_folded_and_materialised_readers_decode_alike(family):
    model = tiny_model()
    operator, cache = operator_for(model, family), decode.repeatable_cache(model, 12)
    plain = decode.decode(model, cache)
    with protect(model, operator):
        folded = decode.decode(model, cache)
    with protect(model, materialised(operator)):
        formed = decode.decode(model, cache)
    torch.testing.assert_close(folded, formed, rtol=1e-4, atol=1e-4)
    assert (folded - plain).abs().max() > 0.01


def test_overhead_has_a_row_for_every_reader_and_length():
    frame = decode.overhead(tiny_model(), positions=(4, 8), layers=(0, 1), rank=2, rounds=2)
    readers = ["plain", "folded", "materialised", "folded", "folded"]
    assert frame["reader"].tolist() == 2 * readers
    assert frame["positions"].tolist() == 5 * [4] + 5 * [8]
    assert (frame["ratio"] > 0).all()


def test_contenders_take_turns_and_are_compared_within_a_round():
    calls = []

    def contender(name, times):
        def run():
            calls.append(name)
            return next(times)

        return run

    # a machine that slows down from round to round; the first round warms up
    slow, fast = iter([9.0, 2, 4, 6, 8, 10, 12, 14]), iter([9.0, 1, 2, 3, 4, 5, 6, 7])
    times = interleave({"slow": contender("slow", slow), "fast": contender("fast", fast)}, rounds=7, what="test")
    assert calls[:6] == ["slow", "fast", "fast", "slow", "slow", "fast"]
    pd.testing.assert_series_equal(times["slow"], 2 * times["fast"], check_names=False)
    ratio = median_ratio(times["slow"], times["fast"])
    assert (ratio.low, ratio.estimate, ratio.high) == (2, 2, 2)
