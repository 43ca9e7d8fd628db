"""Token vectors: the rotation of keys against the model's own, and what the token ids tell against a real prefill."""

import sys

import pytest
import torch
import transformers as hf
from small_models import CONFIGS, SIZES, model_of, padded_batch
from transformers import DynamicCache

from cachemedic.models.cache import stack_cache
from cachemedic.token.layerwise.scrub import positions_of
from cachemedic.token.layerwise.token_prior import lowest_layers
from cachemedic.token.layerwise.token_vectors import KeyRotation, join, split

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def prefill(model, ids, mask, position_ids):
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
    return stack_cache(cache)


def test_split_is_the_inverse_of_join_and_keys_come_first():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 3, 2, 4, 5, 6, generator=generator)
    x = join(key, value)
    assert x.shape == (3, 2, 5, 48)
    assert torch.equal(x[1, 0, 3], torch.cat([*key[1, 0, :, 3], *value[1, 0, :, 3]]))
    for side, back in zip((key, value), split(x, 4), strict=True):
        assert torch.equal(side, back)


def llama_with_yarn():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_parameters=YARN)).eval()


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_length_of_the_text_are_refused(rope_type):
    """A scrub looks at some tokens at a time: it would take sound keys for damaged ones."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_parameters=rope))
    with pytest.raises(ValueError, match=f"is '{rope_type}': its angles depend on the length of the text"):
        KeyRotation(model)


def test_a_model_with_layers_without_rotation_is_refused():
    model = hf.AutoModelForCausalLM.from_config(
        hf.SmolLM3Config(**SIZES, num_key_value_heads=2, no_rope_layers=[1, 0, 1])
    )
    with pytest.raises(ValueError, match="rotates the keys of its layers in different ways"):
        KeyRotation(model)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3", "phi", "yarn"])
def test_keys_are_turned_as_the_model_turns_them(name, monkeypatch):
    model = llama_with_yarn() if name == "yarn" else model_of(name)
    module = sys.modules[type(model).__module__]
    real, before = module.apply_rotary_pos_emb, []

    def recorded(q, k, *args, **kwargs):
        before.append(k)
        return real(q, k, *args, **kwargs)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", recorded)
    ids, mask = padded_batch(3, 12)
    positions = positions_of(mask.bool())
    key, value = prefill(model, ids, mask, positions.clamp_min(0))
    rotation = KeyRotation(model).at(positions)
    stored = join(key, value)
    unrotated, values = split(rotation.undo(stored), key.shape[2])
    assert torch.equal(values, value)
    plain = torch.stack(before, 1)  # of models that turn only a part of each key: that part
    scale = getattr(model.base_model.rotary_emb, "attention_scaling", 1.0)
    assert (scale != 1.0) == (name == "yarn")
    torch.testing.assert_close(unrotated[..., : plain.shape[-1]], plain * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unrotated[..., plain.shape[-1] :], key[..., plain.shape[-1] :], rtol=0, atol=0)
    assert (plain[..., -1, :] - key[..., -1, : plain.shape[-1]]).abs().max() > 0.1, "the rotation matters"
    torch.testing.assert_close(rotation.redo(rotation.undo(stored)), stored, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotation.undo(rotation.redo(stored)), stored, rtol=1e-5, atol=1e-5)
    one_layer = rotation.undo(stored[:, 1])
    assert torch.equal(one_layer, rotation.undo(stored)[:, 1])
    torch.testing.assert_close(one_layer.norm(dim=-1), stored[:, 1].norm(dim=-1))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_models_without_rotation_are_left_as_they_are(name):
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    rotation = KeyRotation(model_of(name)).at(torch.arange(4).expand(2, -1))
    assert torch.equal(rotation.undo(x), x)
    assert torch.equal(rotation.redo(x), x)


def test_layers_that_turn_in_different_ways_are_refused():
    with pytest.raises(ValueError, match="Gemma3.* rotates the keys of its layers in different ways"):
        KeyRotation(model_of("gemma3"))


def test_pairs_that_lie_otherwise_are_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="CohereForCausalLM does not rotate number i"):
        KeyRotation(hf.CohereForCausalLM(hf.CohereConfig(**SIZES)))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma3"])
def test_the_lowest_layers_are_those_of_a_prefill(name, count):
    model = model_of(name)
    ids, mask = padded_batch(3, 10)
    positions = positions_of(mask.bool())
    found = lowest_layers(model, ids, positions, count)
    expected = prefill(model, ids, mask, positions.clamp_min(0))
    present = mask.bool()[:, None, None, :, None]
    for own, real in zip(found, expected, strict=True):
        assert own.shape[1] == count
        torch.testing.assert_close(own * present, real[:, :count] * present, rtol=1e-4, atol=1e-5)
    alone = lowest_layers(model, ids[2:, 4:], positions[2:, 4:], count)  # the same row without its padding
    torch.testing.assert_close(alone[0], found[0][2:, :, :, 4:], rtol=1e-4, atol=1e-5)


def test_asking_for_the_lowest_layers_leaves_nothing_behind():
    model = model_of("llama")
    ids, mask = padded_batch(2, 8)
    before = model(ids, attention_mask=mask).logits
    lowest_layers(model, ids, positions_of(mask.bool()), 1)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
