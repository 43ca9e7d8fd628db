"""Operators on disk, and definitions that are refused."""

import json

import numpy as np
import pytest
import torch
from small_models import shaken
from transformers import Gemma4TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MambaConfig

from cachemedic.core.files import seal
from cachemedic.repair.operator import RepairOperator

LLAMA = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=50)


@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_saving_and_loading_keeps_every_bit(tmp_path, family):
    op = shaken(RepairOperator.create(family, LLAMA, [0, 2], rank=4, apply_to="V", runs=2))
    op.save_pretrained(tmp_path / "op")
    loaded = RepairOperator.from_pretrained(tmp_path / "op")
    assert loaded.config == op.config
    assert type(loaded) is type(op)
    before, after = dict(op.named_parameters()), dict(loaded.named_parameters())
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and after[name].requires_grad for name in before)


def test_numpy_numbers_become_plain_ones(tmp_path):
    op = RepairOperator.create("A", LLAMA, np.arange(2), rank=np.int64(4))
    op.save_pretrained(tmp_path)
    assert RepairOperator.from_pretrained(tmp_path).config == op.config
    for number in (*op.layers, op.rank):
        assert type(number) is int
    for seed, plain in ((np.int64(3), 3), (np.arange(1, 3), [1, 2])):
        created = [RepairOperator.create("A", LLAMA, [0], seed=s, runs=np.size(seed)) for s in (seed, plain)]
        pairs = zip(*(op.parameters() for op in created), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_definition_that_json_cannot_hold_leaves_the_saved_operator(tmp_path):
    good = shaken(RepairOperator.create("A", LLAMA, [0]))
    good.save_pretrained(tmp_path)
    other = RepairOperator.create("A", LLAMA, [0], seed=1)
    other.config.options["gate_hidden"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        other.save_pretrained(tmp_path)
    loaded = RepairOperator.from_pretrained(tmp_path)
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in good.named_parameters())


def test_damaged_or_foreign_checkpoints_are_refused(tmp_path):
    op = RepairOperator.create("A", LLAMA, [0, 2], rank=4)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        RepairOperator.from_pretrained(tmp_path / "nothing")

    op.save_pretrained(tmp_path)
    weights, config = tmp_path / "operator.safetensors", tmp_path / "config.json"
    good, record = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="sha256"):
        RepairOperator.from_pretrained(tmp_path)
    weights.write_bytes(good)

    for changed in ({"rank": 5}, {"layers": [1, 2]}, {"model": record["model"] | {"num_heads": 8}}, {"ranks": 4}):
        config.write_text(json.dumps(record | changed))
        with pytest.raises(ValueError, match="config.json is damaged: it is not as it was saved"):
            RepairOperator.from_pretrained(tmp_path)
    for text in ("{", "[]", "{}", "\x00"):
        config.write_text(text)
        with pytest.raises(ValueError, match="config.json is damaged"):
            RepairOperator.from_pretrained(tmp_path)
    config.write_bytes(seal(record | {"rank": 5}))
    with pytest.raises(ValueError, match="shapes"):
        RepairOperator.from_pretrained(tmp_path)
    config.write_bytes(seal(record | {"ranks": 4}))
    with pytest.raises(ValueError, match="did you mean 'rank'"):
        RepairOperator.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match="gpt2"):
        op.check_model(GPT2Config(n_layer=3, n_embd=64, n_head=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "AA"}, "unknown operator family 'AA': did you mean 'A'"),
        ({"gate_hiden": 4}, "did you mean 'gate_hidden'"),
        ({"head_embedding": True}, "unknown option of operator family A 'head_embedding'"),
        ({"apply_to": "Q"}, "allowed: 'K', 'KV', 'V'"),
        ({"layers": [3]}, "layer 3 is out of range: the model has layers 0 to 2"),
        ({"layers": [-1]}, "layer -1 is out of range"),
        ({"layers": []}, "one or more distinct"),
        ({"layers": [1, 1]}, "one or more distinct"),
        ({"rank": 17}, "rank 17 is out of range: allowed are 1 to the head size, 16"),
        ({"rank": 0}, "rank 0 is out of range"),
        ({"gate_hidden": 0}, "gate_hidden must be from 1 to 1024, not 0"),
        ({"gate_hidden": 2**70}, "gate_hidden must be from 1 to 1024"),
        ({"runs": 0}, "runs must be from 1 to 1024, not 0"),
        ({"runs": 2**70}, "runs must be from 1 to 1024"),
        ({"rank": 2**70}, "rank .* is out of range"),
        ({"layers": range(2**70)}, "layers holds more than 1024 numbers"),
        ({"seed": range(2**70)}, "seed holds more than 1024 numbers"),
        ({"seed": 2**70}, "seed must be from 0 to 18446744073709551615"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"family": "E", "share": float("nan")}, "share nan is out of range: a number from"),
        ({"family": "E", "share": 2}, "share 2 is out of range"),
        ({"family": "D", "rounds": 2**70}, "rounds must be from 1 to 1024"),
        ({"seed": [1, 2]}, "2 numbers for 1 runs"),
        ({"layers": "01"}, "layers must be layer numbers or 'all'"),
    ],
)
def test_bad_input_gives_one_clear_error(arguments, message):
    defaults = {"family": "A", "model_config": LLAMA, "layers": [0]}
    with pytest.raises(ValueError, match=message):
        RepairOperator.create(**(defaults | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 2}, r"layers must be a list of whole numbers, such as \[0, 1\], not 2"),
        ({"seed": 0.5}, "seed must be a whole number"),
        (
            {"model_config": LlamaForCausalLM(LLAMA)},
            "a LlamaForCausalLM is no configuration of a model: give model.config",
        ),
        ({"model_config": "gpt2"}, "a str is no configuration of a model"),
        ({"layers": [0.5]}, "a number of layers must be a whole number, not 0.5"),
        ({"rank": 2.0}, "rank"),
        ({"runs": 1.5}, "runs must be a whole number, not 1.5"),
        ({"gate_hidden": 4.0}, "gate_hidden must be a whole number, not 4.0"),
        ({"share_heads": "no"}, "share_heads must be a bool, not a str"),
        ({"family": "C", "head_embedding": 2}, "head_embedding must be a bool, not a int"),
        ({"family": "E", "with_ids": None}, "with_ids must be a bool, not a NoneType"),
        ({"family": "E", "share": "1/128"}, "share must be a number, such as 1/128, not '1/128'"),
        ({"family": "E", "share": True}, "share must be a number"),
        ({"family": "D", "hidden": "16"}, "hidden must be a whole number, not '16'"),
    ],
)
def test_numbers_that_are_not_whole_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        RepairOperator.create(**({"family": "A", "model_config": LLAMA, "layers": [0]} | arguments))


@pytest.mark.parametrize(
    ("family", "options"),
    [("A", {"gate_hidden": np.int64(4)}), ("E", {"hidden": np.int32(4), "share": np.float32(0.25)})],
)
def test_options_may_be_numbers_of_numpy(family, options, tmp_path):
    given = RepairOperator.create(family, LLAMA, [0], np.int16(2), runs=np.int64(2), **options)
    plain = RepairOperator.create(family, LLAMA, [0], 2, runs=2, **{name: x.item() for name, x in options.items()})
    assert given.config == plain.config
    given.save_pretrained(tmp_path)
    assert RepairOperator.from_pretrained(tmp_path).config == plain.config


def test_no_bit_of_a_saved_operator_changes_unseen(tmp_path):
    op = shaken(RepairOperator.create("A", LLAMA, [0, 2], rank=2))
    op.save_pretrained(tmp_path)
    numbers = np.random.default_rng(0)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        for at in numbers.integers(8 * len(content), size=60):
            spoilt = bytearray(content)
            spoilt[at // 8] ^= 1 << at % 8
            path.write_bytes(spoilt)
            try:
                loaded = RepairOperator.from_pretrained(tmp_path)
            except ValueError as error:
                assert path.name in str(error)  # noqa: PT017
            else:  # white space between two words of JSON
                assert path.name == "config.json"
                assert loaded.config == op.config
        path.write_bytes(content)


def test_models_without_attention_or_with_layers_of_their_own_sizes_are_refused():
    with pytest.raises(ValueError, match="mamba has no attention heads"):
        RepairOperator.create("A", MambaConfig(num_hidden_layers=2), [0])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"gemma4_text has layers of different head_dim \(8, 16\)"):
        RepairOperator.create("A", Gemma4TextConfig(**sizes, head_dim=8, global_head_dim=16, layer_types=kinds), [0])
    alike = Gemma4TextConfig(**sizes, head_dim=8, global_head_dim=8, layer_types=kinds)
    assert RepairOperator.create("A", alike, [0]).head_dim == 8
