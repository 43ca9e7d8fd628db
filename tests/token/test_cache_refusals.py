"""What a `SketchCache` refuses, each in one sentence: calls, models, and layers that are not as they were written."""

import copy
import pickle

import pytest
import torch
from checked_caches import filled, shift
from joint_operators import joint_of
from small_models import VOCABULARY, model_of, padded_batch
from transformers import DynamicCache, EncoderDecoderCache

from cachemedic.repair.operator import RepairOperator
from cachemedic.token.cache import SketchCache


def test_ids_masks_and_positions_of_wrong_shapes_are_refused():
    model = model_of("llama")
    ids, mask = padded_batch(length=6)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for given, words in [
        ({"input_ids": ids[0]}, r"input_ids \[B, M\], not \[6\]"),
        ({"input_ids": ids, "attention_mask": mask[:2], "position_ids": positions}, r"\[3, 6\], not a mask \[2, 6\]"),
        ({"input_ids": ids, "attention_mask": mask, "position_ids": positions[:2]}, r"\[3, 6\], not \[2, 6\]"),
        ({"input_ids": ids, "attention_mask": mask, "position_ids": positions[:, :4]}, r"\[3, 6\], not \[3, 4\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(**given, past_key_values=SketchCache(model))


def test_what_cannot_be_kept_is_refused():
    model, cache, ids, mask = filled()
    with pytest.raises(ValueError, match="pass input_ids in place of inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=SketchCache(model))
    with pytest.raises(ValueError, match="pass position_ids"):
        model(ids, attention_mask=mask, past_key_values=SketchCache(model))
    with pytest.raises(ValueError, match=r"attention mask \[3, 12\], not a mask \[3, 1, 12, 12\]"):
        model(ids, attention_mask=mask[:, None, None].expand(-1, 1, 12, -1), past_key_values=SketchCache(model))
    with pytest.raises(ValueError, match="with the model it was made for"):
        model_of("llama")(ids, past_key_values=copy.copy(cache))
    with pytest.raises(ValueError, match="12 tokens already"):
        SketchCache(model, storage=model(ids).past_key_values)
    with pytest.raises(ValueError, match="empty: prefill it first"):
        SketchCache(model).check()
    with pytest.raises(TypeError, match="must be a DynamicCache or StaticCache, not a EncoderDecoderCache"):
        SketchCache(model, storage=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    mistral = model_of("mistral")
    with pytest.raises(ValueError, match="not in a DynamicSlidingWindowLayer"):
        SketchCache(mistral, storage=DynamicCache(config=mistral.config))
    with pytest.raises(TypeError, match="is not pickled: use `cache.save"):
        pickle.dumps(cache)
    super(SketchCache, cache).update(*(torch.zeros(3, 2, 1, 8) for _ in "kv"), 0)
    for act in (cache.check, lambda: model(ids[:, :1], past_key_values=cache)):
        with pytest.raises(ValueError, match="holds 13 tokens, 12 of them written"):
            act()


def test_a_model_that_stores_other_tokens_than_it_is_given_is_refused():
    """As with virtual tokens in front of a prompt."""
    model = model_of("llama")
    cache = SketchCache(model)
    cache.begin(torch.ones(1, 3).long(), torch.arange(3)[None])
    with pytest.raises(ValueError, match="LlamaForCausalLM stores 5 tokens for 3 ids: each needs an id"):
        cache.update(*torch.ones(2, 1, 2, 5, 8), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layers: setattr(layers[1], "keys", layers[1].keys[:, :1]),
            r"the keys of layer 1 .* not torch.float32 \[",
        ),
        (
            lambda layers: setattr(layers[0], "values", layers[0].values.bfloat16()),
            r"values of layer 0 .* torch.bfloat16",
        ),
        (lambda layers: setattr(layers[1], "keys", layers[1].keys.repeat(2, 1, 1, 1)), r"must be torch.float32 \[3, "),
        (lambda layers: setattr(layers[2], "values", layers[2].values[:, :, :4]), "values of layer 2"),
        (lambda layers: setattr(layers[1], "keys", None), "not a NoneType"),
        (lambda layers: layers.pop(), "holds 2 layers; its model has 3"),
    ],
)
def test_layers_of_another_shape_than_was_written_are_refused_in_one_sentence(change, message):
    _, cache, _, _ = filled(length=12)
    change(cache.layers)
    for act in (cache.check, lambda: cache.repair("erase")):
        with pytest.raises(ValueError, match=message):
            act()


def test_a_cache_written_under_autocast_is_computed_again_under_autocast_only():
    model = model_of("gpt2")
    ids = torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = SketchCache(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, past_key_values=cache)
    shift(cache, 0, [4])
    with pytest.raises(ValueError, match="under the torch.autocast that it was written under"):
        cache.repair("recompute")
    with torch.autocast("cpu", torch.bfloat16):
        assert cache.repair("recompute").verified == 1


def test_keys_and_values_of_two_number_formats_are_refused():
    model = model_of("llama")  # whose rotary embedding computes in single precision
    ids = torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="numbers of one format, not torch.bf"):
        model(ids, past_key_values=SketchCache(model))


def test_an_operator_of_several_runs_is_refused():
    operator = RepairOperator.create("E", model_of("llama").config, layers="all", runs=2)
    operator.set_joint(joint_of("llama"))
    with pytest.raises(ValueError, match="holds 2 runs: give one of them"):
        SketchCache(model_of("llama"), operator)
