"""Whole-token vectors: keys as before their rotation, whatever way the model computes its angles."""

import pytest
import torch
import transformers as hf
from small_models import GROUPED, VOCABULARY

from cachemedic.models.cache import stack_cache
from cachemedic.token.vectors import KeyRotation, TokenVectors

GEMMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 64,
    "query_pre_attn_scalar": 16,
}  # fmt: skip


def gemma(*layer_types, **options):
    torch.manual_seed(0)
    config = hf.Gemma3TextConfig(**GEMMA, layer_types=list(layer_types), **options)
    return hf.Gemma3ForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_an_embedding_for_several_kinds_of_layers_serves_a_model_of_one_kind(kind):
    model = gemma(kind, kind, kind)
    ids, positions = torch.arange(1, 8)[None], torch.arange(7)[None]
    keys, values = stack_cache(model(ids).past_key_values)
    cos, sin = KeyRotation(model).angles(positions, torch.float32, whole=True)
    expected = model.model.rotary_emb(torch.zeros(1), positions, kind)
    torch.testing.assert_close((cos, sin), tuple(expected))
    vectors = TokenVectors(model)
    x = vectors.of(list(keys.unbind(1)), list(values.unbind(1)), positions)
    back = vectors.back(x, positions)
    torch.testing.assert_close(back, (keys, values), atol=1e-5, rtol=1e-5)


def test_a_rotation_by_complex_numbers_is_refused():
    config = hf.Llama4TextConfig(**GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=2)
    with pytest.raises(ValueError, match="Llama4ForCausalLM does not rotate number i of a key with number i"):
        KeyRotation(hf.Llama4ForCausalLM(config).eval())


def test_layers_of_several_kinds_are_refused():
    with pytest.raises(ValueError, match="rotates the keys of its layers in different ways"):
        KeyRotation(gemma("sliding_attention", "full_attention", "full_attention"))
