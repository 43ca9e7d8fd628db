"""What `protect` refuses, and what it leaves no trace in: copies, other threads, other parts of a model."""

import copy
import io
import threading
import warnings

import pytest
import torch
import transformers as hf
from small_models import GROUPED, PAD, SIZES, VOCABULARY, model_of, operator_for, padded_batch, shaken

from cachemedic.repair.attach import IdleOperatorWarning, protect
from cachemedic.repair.operator import RepairOperator

ONE_IN_TWO = {"attn_layer_period": 2, "attn_layer_offset": 1}
JAMBA = ONE_IN_TWO | {"num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4}


def model_from(config):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def hybrids():
    """Models with layers that attend and layers that do not, and a list of each."""
    lfm2 = hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"])
    return {"jamba": (hf.JambaConfig(**GROUPED, **JAMBA), [1], [0, 2]), "lfm2": (lfm2, [1], [0, 2])}


@pytest.mark.parametrize("name", ["jamba", "lfm2"])
def test_layers_without_attention_are_refused_and_the_others_are_repaired(name):
    config, attending, others = hybrids()[name]
    model, (ids, _) = model_from(config), padded_batch()
    plain = model(ids).logits
    with torch.no_grad(), protect(model, shaken(RepairOperator.create("A", config, attending, 3))):
        assert not torch.allclose(model(ids).logits, plain)
    for layers in (others, [*others, *attending]):
        operator = RepairOperator.create("A", config, layers, 3)
        with pytest.raises(ValueError, match=r"layers \[0, 2\] .*no self-attention"), protect(model, operator):
            pass


def test_attention_that_is_not_told_its_layer_is_refused():
    model = model_of("gpt2")  # as in Zamba, whose layers share attention modules
    model.transformer.h[2].attn.layer_idx = -1
    with pytest.raises(ValueError, match=r"layers \[2\] .*no self-attention"), protect(model, operator_for(model)):
        pass


def test_attention_across_to_an_image_is_not_taken_for_self_attention():
    text = {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "cross_attention_layers": [1]}
    model = hf.MllamaForCausalLM(hf.MllamaTextConfig(**text)).eval().requires_grad_(False)
    with (
        pytest.raises(ValueError, match=r"layers \[1\] .*no self-attention"),
        protect(model, RepairOperator.create("A", model.config, [0, 1], 3)),
    ):
        pass


def test_a_new_operator_leaves_models_alone_that_view_the_output_of_attention():
    config = hf.AfmoeConfig(
        **GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, num_local_experts=4,
        sliding_window=6,
    )  # fmt: skip
    model, (ids, _) = model_from(config), padded_batch()
    plain = model(ids).logits
    for family in "ABC":
        with torch.no_grad(), protect(model, RepairOperator.create(family, config, [0, 1], 3)):
            torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_copies_made_within_are_plain_models(implementation):
    model, (ids, _) = model_of("llama", implementation), padded_batch()
    plain, file = model(ids).logits, io.BytesIO()
    with torch.no_grad(), protect(model, operator_for(model)):
        twin = copy.deepcopy(model)
        torch.save(model, file)
        assert torch.equal(twin(ids).logits, plain)  # also within
        assert not torch.allclose(model(ids).logits, plain)
    assert b"cachemedic" not in file.getvalue()  # what was saved knows nothing of the protection
    assert torch.equal(twin(ids).logits, plain)
    assert twin.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in twin.modules())


def test_each_thread_has_its_own_protection_and_no_thread_sees_that_of_another():
    model, (ids, _) = model_of("llama"), padded_batch()
    operators = [operator_for(model), operator_for(model, "C", layers=[1])]
    expected, found, both = [], {}, threading.Barrier(3)
    for operator in operators:
        with torch.no_grad(), protect(model, operator):
            expected.append(model(ids).logits)

    def serve(i):
        with torch.no_grad(), protect(model, operators[i]):
            both.wait(20)
            found[i] = model(ids).logits
            both.wait(20)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    both.wait(20)
    with pytest.raises(RuntimeError, match="protected in another thread"):
        model(ids)
    both.wait(20)
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


def test_only_attention_functions_that_were_registered_are_left_behind():
    before = dict(hf.AttentionInterface._global_mapping)
    model = model_of("llama", "eager")

    def mine(*args, **kwargs):
        raise AssertionError

    try:
        with protect(model, operator_for(model)):
            assert "eager" in hf.AttentionInterface._global_mapping
            hf.AttentionInterface.register("mine", mine)
        assert hf.AttentionInterface._global_mapping == before | {"mine": mine}
    finally:
        hf.AttentionInterface._global_mapping.pop("mine", None)


def test_models_with_other_names_for_eager_attention_are_left_alone():
    """Vision parts may call their eager attention otherwise; unprotected, they must meet their own function."""
    model, (ids, _) = model_of("llama", "eager"), padded_batch()
    other = model_from(hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=PAD,
    ))  # fmt: skip
    other.set_attn_implementation("eager")
    plain = other(ids).logits
    with protect(model, operator_for(model)):
        assert torch.equal(other(ids).logits, plain)


def test_an_offloaded_model_is_refused_by_that_name():
    model = model_of("llama").to("meta")
    with (
        pytest.raises(ValueError, match="layer 0 of LlamaForCausalLM is offloaded"),
        protect(model, operator_for(model)),
    ):
        pass


DECODERS = {
    # attention to an encoder, which is not there, and a module called decoder that holds no layers
    "bart": lambda: hf.BartConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=3, encoder_layers=3, decoder_attention_heads=4,
        encoder_attention_heads=4, decoder_ffn_dim=48, encoder_ffn_dim=48, max_position_embeddings=64, is_decoder=True,
        is_encoder_decoder=False, init_std=0.3,
    ),
    "modernbert-decoder": lambda: hf.ModernBertDecoderConfig(**SIZES),
    "diffllama": lambda: hf.DiffLlamaConfig(**GROUPED),
    "olmo3": lambda: hf.Olmo3Config(**GROUPED, sliding_window=6),
    "gpt_oss": lambda: hf.GptOssConfig(
        **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_unusual_build_are_repaired(name):
    model, (ids, _) = model_from(DECODERS[name]()), padded_batch()
    ids = ids.clamp_min(1)
    plain = model(ids).logits
    with torch.no_grad(), protect(model, RepairOperator.create("A", model.config, [0, 1], 3)):
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=1e-4)
    with torch.no_grad(), protect(model, operator_for(model, layers=[0, 1])):
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3)


@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_an_operator_that_was_never_trained_is_told(family):
    model = model_of("llama")
    untrained = RepairOperator.create(family, model.config, [0, 1], 3)
    with pytest.warns(IdleOperatorWarning, match="changes nothing: it was never trained"), protect(model, untrained):
        pass
    with warnings.catch_warnings(action="error"), protect(model, operator_for(model, family)):
        pass


def test_an_operator_that_repairs_what_is_stored_is_told():
    model = model_of("llama")
    operator = RepairOperator.create("E", model.config, "all")
    with pytest.warns(IdleOperatorWarning, match="past_key_values=SketchCache"), protect(model, operator):
        pass
