"""The costs of a cache that can be repaired: every operation does its work and has its row."""

import pytest
import torch
from joint_operators import operator_of
from small_models import CONFIGS, VOCABULARY, model_of

from cachemedic.models.load import Base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.bench import whole_tokens
from cachemedic.studies.bench.whole_tokens import DAMAGED, MEASURED_WAYS, Setting, measured, repair_cost


class Tokenizer:
    """All that the benchmark asks of one: a token for each letter."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


@pytest.mark.parametrize("share", [None, 0.1])
def test_every_operation_has_its_row_and_its_bytes(monkeypatch, share):
    monkeypatch.setattr(whole_tokens, "STEPS", 4)
    operator = operator_of("llama", share)
    base = Base(model_of("llama"), Tokenizer(), "tiny")
    frame = repair_cost(base, operator, lengths=(24, 48, 1024), rounds=2)
    ways = [way for way in MEASURED_WAYS for _ in DAMAGED]
    assert frame["operation"].tolist() == 2 * ["write", "check", *ways, "decoding step"]
    assert frame["positions"].tolist() == 12 * [24] + 12 * [48]
    assert CONFIGS["llama"]().max_position_embeddings == 64  # where 1,024 tokens do not fit
    assert frame["damaged"].tolist() == 2 * [0.0, 0.0, *DAMAGED, *DAMAGED, *DAMAGED, 0.0]
    assert (frame.query("operation != 'write'")[["milliseconds", "ratio"]] > 0).all(axis=None)
    assert frame["operator"].unique().tolist() == ["D" if share is None else "E"]
    assert frame["code_bytes"].unique().tolist() == [operator.bytes_per_token]
    assert frame["fixed_bytes"].unique().tolist() == [operator.fixed_bytes]
    expected = 17 + 8 + 4 * 3 + operator.bytes_per_token  # id, position, erased, hashes and code
    assert frame["bytes_per_token"].unique().tolist() == [expected]


@pytest.mark.parametrize("cores", ["one", "all"])
def test_a_setting_is_measured_in_its_number_format_and_on_its_cores(monkeypatch, cores):
    monkeypatch.setattr(whole_tokens, "STEPS", 1)
    seen = set()

    def cost(base, operator, lengths):
        seen.add((base.model.dtype, torch.get_num_threads()))
        return repair_cost(base, operator, lengths, rounds=1)

    monkeypatch.setattr(whole_tokens, "repair_cost", cost)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        operator = RepairOperator.from_pretrained("E/embedded-llama")
        frame = measured(Setting("embedded-llama", "E", (32,), torch.bfloat16, cores), operator)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == {(torch.bfloat16, 1 if cores == "one" else 2)}
    assert frame[["dtype", "cores"]].drop_duplicates().to_numpy().tolist() == [["bfloat16", cores]]
