"""Loading of base models, and the start from which the embedded ones are trained."""

import json
from contextlib import suppress

import pytest
import torch
from small_models import model_of
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
)

from cachemedic import calibrate, protect
from cachemedic.core.files import seal
from cachemedic.models import load as models
from cachemedic.models.base_files import defining_digests
from cachemedic.models.load import Base, decoder_layers, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.pretraining.initialisation import INDUCTION_LAYER, PREVIOUS_LAYER, add_induction_circuit
from cachemedic.studies.pretraining.train import new_model


@pytest.fixture(params=["gpt2", "llama"])
def folder(request, tmp_path):
    """A causal LM as Hugging Face saves it, in a local folder."""
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The folder of the embedded bases, with one in it."""
    monkeypatch.setattr(models, "WEIGHTS", tmp_path)
    folder = tmp_path / "embedded-gpt2"
    tiny_model().half().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    digests = defining_digests(folder)
    (folder / "card.json").write_bytes(seal({"sha256": digests}))
    return folder


def test_a_local_folder_is_loaded_frozen(folder):
    ids = torch.arange(1, 9)[None]
    base = load_base(folder)
    assert base.name == str(folder)
    assert base.context == 320
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    expected = tiny_model("llama" if base.model.config.model_type == "llama" else "gpt2")(ids).logits
    torch.testing.assert_close(base.model(ids).logits, expected)
    assert base.tokenizer("a bridge")["input_ids"] == tiny_tokenizer()("a bridge")["input_ids"]
    assert load_base(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_an_embedded_base_is_loaded_in_single_precision(weights):
    base = load_base("embedded-gpt2")
    assert base.name == "embedded-gpt2"
    assert base.model.dtype == torch.float32
    torch.testing.assert_close(base.model.lm_head.weight, tiny_model().half().float().lm_head.weight)


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_damaged_weights_are_refused(weights, at):
    data = bytearray((weights / "model.safetensors").read_bytes())
    data[at] ^= 1
    (weights / "model.safetensors").write_bytes(data)
    with pytest.raises(OSError, match=r"model.safetensors is damaged: sha256 .*make base-models"):
        load_base("embedded-gpt2")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_says_what_the_weights_mean_is_checked_too(weights, name):
    text = (weights / name).read_text()
    (weights / name).write_text(text.replace("0", "1", 1))
    with pytest.raises(OSError, match=rf"{name} is damaged: sha256 "):
        load_base("embedded-gpt2")
    (weights / name).unlink()
    with pytest.raises(OSError, match=rf"{name} is damaged: no file instead of sha256 "):
        load_base("embedded-gpt2")
    (weights / name).write_text(text)
    (weights / "chat_template.jinja").write_text("another file that transformers would read")
    with pytest.raises(OSError, match="chat_template.jinja is damaged: sha256 .* instead of no file"):
        load_base("embedded-gpt2")


@pytest.mark.parametrize("card", ["", "{", "[]", '{"sha256": 3}', '{"sha256": "abc"}', '{"weights": {}}'])
def test_a_damaged_card_is_named(weights, card):
    (weights / "card.json").write_text(card)
    with pytest.raises(OSError, match="card.json is missing or damaged"):
        load_base("embedded-gpt2")
    with suppress(ValueError, TypeError, AttributeError):
        (weights / "card.json").write_bytes(seal(json.loads(card)))
    with pytest.raises(OSError, match="card.json is missing or damaged"):
        load_base("embedded-gpt2")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "vocab.json", "adapter_config.json"])
def test_files_that_transformers_would_read_besides_are_refused(weights, name):
    (weights / name).write_text("{}")
    with pytest.raises(OSError, match=f"{name} is damaged: sha256 .* instead of no file"):
        load_base("embedded-gpt2")


def test_cut_off_weights_are_refused(weights):
    data = (weights / "model.safetensors").read_bytes()
    (weights / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match="damaged"):
        load_base("embedded-gpt2")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("embedded-gtp2", "did you mean 'embedded-gpt2'"),
        ("embeded-llama", "did you mean 'embedded-llama'"),
        ("smollm-135m", "did you mean 'smollm2-135m'"),
        ("embedded-bert", "unknown base 'embedded-bert'"),
        ("no/such/folder", "unknown base 'no/such/folder'"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
    ],
)
def test_an_unknown_name_is_refused_without_a_download(name, hint, monkeypatch):
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("looked for on the hub"))
    with pytest.raises(ValueError, match=rf"{hint}.*embedded-gpt2, embedded-llama, .*smollm2-135m, the name of|{hint}"):
        load_base(name)


def test_a_misspelt_name_of_the_hub_is_refused_at_once_where_the_hub_is_out_of_reach(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("cachemedic.core.hub.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("looked for on the hub"))
    with pytest.raises(ValueError, match="unknown base 'gpt2-medum': .*cannot be reached \\(no route to host\\)"):
        load_base("gpt2-medum")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model of transformers: it has no config.json"):
        load_base(tmp_path)


def test_weights_in_a_pickle_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could not be loaded as a local folder"):
        load_base(folder)


def test_code_beside_a_model_is_not_run(folder):
    (folder / "configuration_own.py").write_text("raise SystemExit('this code was run')")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(ValueError, match="could not be loaded as a local folder"):
        load_base(folder)


def test_double_precision_is_refused_wherever_a_model_comes_in():
    model = tiny_model().double()
    refused = pytest.raises(ValueError, match="in float64 is not served; allowed: float32, bfloat16, float16")
    with refused:
        load_base("embedded-gpt2", dtype=torch.float64)
    with refused, protect(model, RepairOperator.create("A", model.config, [0, 2])):
        pass
    with refused:
        calibrate(RepairOperator.create("E", model.config, range(3)), Base(model, tiny_tokenizer(), "tiny"))


def test_the_text_part_of_a_composite_model_counts(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = Gemma3Config(
        text_config=sizes | {"vocab_size": 400, "num_key_value_heads": 2, "max_position_embeddings": 72, "head_dim": 8},
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert base.context == 72
    assert base.config.num_hidden_layers == 2
    found, name = decoder_layers(base.model)  # the vision part has a list of two layers as well
    assert found is base.model.get_decoder()
    assert name == "layers"


def test_a_model_that_states_no_context_is_named():
    model = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))  # its positions have no end
    base = Base(model, tiny_tokenizer(), "tiny")
    with pytest.raises(ValueError, match="configuration of tiny states no max_position_embeddings"):
        _ = base.context


def test_the_list_of_layers_is_found():
    opt = OPTForCausalLM(OPTConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=8,
    ))  # fmt: skip
    gpt2, llama = tiny_model(), tiny_model("llama")
    assert decoder_layers(gpt2) == (gpt2.transformer, "h")
    assert decoder_layers(llama) == (llama.model, "layers")
    assert decoder_layers(opt) == (opt.model.decoder, "layers")
    bart = model_of("bart")  # three layers; its configuration tells of an encoder with two
    assert decoder_layers(bart) == (bart.model.decoder, "layers")
    opt.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no list of 5 decoder layers"):
        decoder_layers(opt)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_an_untrained_model_has_an_induction_circuit(architecture):
    """On random tokens, repeated: one head reads the previous token, another what followed the last time."""
    model, length = new_model(architecture).eval(), 60
    model.set_attn_implementation("eager")
    once = torch.randperm(2047, generator=torch.Generator().manual_seed(0))[:length] + 1
    with torch.inference_mode():
        weights = model(torch.cat([once, once])[None], output_attentions=True).attentions
    again = torch.arange(length, 2 * length - 1)
    for layer, read in ((PREVIOUS_LAYER, again - 1), (INDUCTION_LAYER, again - length + 1)):
        by_head = weights[layer][0, :, again, read].mean(-1)
        assert by_head[0] > 0.2
        assert (by_head[1:] < 0.02).all()  # the other heads start at random


def test_an_untrained_model_depends_on_its_seed_alone():
    first, second, other = (new_model("gpt2", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_other_architectures_have_no_circuit():
    with pytest.raises(ValueError, match="unknown base 'bert': allowed: 'gpt2', 'llama', 'wikipedia'"):
        new_model("bert")
    with pytest.raises(TypeError, match="no induction circuit for Linear"):
        add_induction_circuit(torch.nn.Linear(2, 2), torch.Generator())


def test_what_is_no_name_and_a_device_that_is_not_there_are_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *_: pytest.fail("loaded"))
    with pytest.raises(TypeError, match="the base must be a str or Path, not a NoneType"):
        load_base(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda': this machine, or its PyTorch, has no CUDA"):
        load_base("embedded-gpt2", device="cuda")
