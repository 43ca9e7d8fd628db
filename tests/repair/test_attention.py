import copy
from contextlib import ExitStack

import pytest
import torch
import transformers as hf
from small_models import PAD, VOCABULARY, model_of, operator_for, padded_batch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cachemedic.repair.attach import protect
from cachemedic.repair.operator import RepairOperator


def state_of(model):
    """All that a protection could leave behind: weights, configuration, hooks, attributes of every module."""
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    attributes = [(sorted(vars(m)), dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    return weights, model.config.to_dict(), model.config._attn_implementation, attributes


def assert_as_before(model, before, ids, logits):
    weights, *rest = state_of(model)
    assert all(torch.equal(weights[name], p) for name, p in before[0].items())
    assert rest == list(before[1:])
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_restored_after_use_exception_nesting_and_exits_out_of_order(implementation):
    model = model_of("llama", implementation)
    ids, _ = padded_batch()
    before, logits = state_of(model), model(ids).logits
    first, second = operator_for(model), operator_for(model, "C", layers=[1, 2])

    with protect(model, first):
        assert not torch.allclose(model(ids).logits, logits)
    assert_as_before(model, before, ids, logits)

    with pytest.raises(RuntimeError, match="from inside"), protect(model, first):
        raise RuntimeError("from inside")
    assert_as_before(model, before, ids, logits)

    with pytest.raises(ValueError, match="runs"), protect(model, operator_for(model, runs=2)):
        model(ids)  # three rows for two runs: fails inside attention
    assert_as_before(model, before, ids, logits)

    with protect(model, first):
        alone = model(ids).logits
        with protect(model, second):
            both = model(ids).logits
        assert torch.equal(model(ids).logits, alone)
    assert not torch.allclose(both, alone)
    assert_as_before(model, before, ids, logits)

    outer, inner = protect(model, first), protect(model, second)
    outer.__enter__()
    inner.__enter__()
    assert torch.equal(model(ids).logits, both)
    outer.__exit__(None, None, None)
    with_second = model(ids).logits
    inner.__exit__(None, None, None)
    assert_as_before(model, before, ids, logits)
    with protect(model, second):
        assert torch.equal(model(ids).logits, with_second)


def test_where_two_protections_meet_the_inner_one_repairs_what_the_outer_one_returns():
    model = model_of("gpt2")
    ids, _ = padded_batch(rows=2)
    identity, op = RepairOperator.create("A", model.config, [0, 2]), operator_for(model)
    with torch.no_grad():
        with protect(model, op):
            expected = model(ids).logits
        for outer, inner in ((identity, op), (op, identity)):
            with protect(model, outer), protect(model, inner):
                assert torch.equal(model(ids).logits, expected)
        with protect(model, op), protect(model, op):
            assert not torch.allclose(model(ids).logits, expected)


@pytest.mark.parametrize("shared_config", [False, True])
def test_two_models_in_one_process_do_not_disturb_each_other(shared_config):
    first, second = model_of("llama"), model_of("llama", seed=1)
    if shared_config:
        second = type(first)(first.config).eval().requires_grad_(False)
    ids, _ = padded_batch()
    plain_first, plain_second = first(ids).logits, second(ids).logits
    op_first, op_second = operator_for(first), operator_for(second, "B", layers=[1])
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(protect(first, op_first))
        repaired_first = first(ids).logits
        assert not torch.allclose(repaired_first, plain_first)
        assert torch.equal(second(ids).logits, plain_second)
        with protect(second, op_second):
            assert not torch.allclose(second(ids).logits, plain_second)
            assert torch.equal(first(ids).logits, repaired_first)
        assert torch.equal(second(ids).logits, plain_second)
        assert torch.equal(first(ids).logits, repaired_first)
    assert torch.equal(first(ids).logits, plain_first)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_flow_through_a_corrupted_cache_into_the_operator_only(implementation):
    """The training step: R * B rows decode M tokens over a stored cache; each run gets the gradient it gets alone."""
    model = model_of("llama", implementation)
    op = operator_for(model, runs=3)
    ids, _ = padded_batch(rows=6)
    ids = ids.clamp_min(1)
    cache = DynamicCache()
    model(ids[:, :5], past_key_values=cache)
    generator = torch.Generator().manual_seed(0)
    damaged = [
        tuple(x + torch.randn(x.shape, generator=generator) for x in (layer.keys, layer.values))
        for layer in cache.layers
    ]

    def gradients(operator, rows):
        cache = DynamicCache()
        for i, (k, v) in enumerate(damaged):
            cache.update(k[rows], v[rows], i)
        with protect(model, operator):
            loss = model(ids[rows, 5:], past_key_values=cache).logits.square().sum()
        return torch.autograd.grad(loss, list(operator.parameters()))

    together = gradients(op, slice(None))
    for run in range(3):
        alone = gradients(op.select(run), slice(2 * run, 2 * run + 2))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[run : run + 1], b, atol=1e-3, rtol=1e-3)
            assert b.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_gates_of_the_last_forward_pass_are_recorded_on_request():
    model = model_of("qwen3")
    op = operator_for(model, apply_to="K")
    ids, _ = padded_batch()
    with protect(model, op, record_gates=True) as protection:
        model(ids)
    assert set(protection.gates) == {0, 2}
    a_k, a_v = protection.gates[2]
    assert a_k.shape == (3, 4, 9, 3)
    assert a_k.requires_grad
    assert a_v is None
    with protect(model, op) as protection:
        model(ids)
    assert protection.gates == {}


def test_half_precision_models_keep_their_type():
    model = model_of("llama").bfloat16()
    ids, _ = padded_batch()
    with protect(model, operator_for(model)), torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_eager_attention_still_returns_its_weights():
    model = model_of("gemma3", "eager")
    ids, _ = padded_batch()
    with protect(model, operator_for(model)), torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    assert len(weights) == 3
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 4, 9))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_implementation_that_is_set_within_is_repaired_too_and_stays(compiled):
    model = model_of("llama")
    ids, _ = padded_batch()
    op, other = operator_for(model), operator_for(model, "C", layers=[1, 2])
    call = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        plain = call(ids).logits
        with protect(model, op):
            expected = call(ids).logits
            with protect(model, other):
                both = call(ids).logits
                model.set_attn_implementation("eager")
                torch.testing.assert_close(call(ids).logits, both, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(call(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(call(ids).logits, plain, atol=1e-4, rtol=1e-4)
        assert model.config._attn_implementation == "eager"
        with protect(model, op):
            model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == "sdpa"
        torch.testing.assert_close(call(ids).logits, plain, atol=1e-4, rtol=1e-4)
        assert model.config._attn_implementation == "sdpa"


def test_output_attentions_can_be_switched_on_within():
    model = model_of("llama", "eager")
    ids, _ = padded_batch()
    with protect(model, operator_for(model)), torch.no_grad():
        expected = model(ids).logits
        model.config.output_attentions = True
        output = model(ids)
    assert torch.equal(output.logits, expected)
    assert len(output.attentions) == 3
    assert model.config.output_attentions
    assert model.config._attn_implementation == "eager"


def test_flash_attention_finds_the_name_it_looks_its_kernel_up_by(monkeypatch):
    name = "some_flash_attention"
    seen = []

    def attention(module, *args, **kwargs):
        seen.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, name, attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, sdpa_mask)
    model, ids = model_of("llama"), padded_batch()[0]
    op = operator_for(model)
    with protect(model, op):
        expected = model(ids).logits
    model.config._attn_implementation = name
    with protect(model, op):
        assert torch.equal(model(ids).logits, expected)
    assert seen == [name] * 3


def test_models_that_cannot_be_protected_are_refused():
    model = model_of("llama")
    op = operator_for(model)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8}
    without_interface = hf.GPTJForCausalLM(hf.GPTJConfig(**sizes, bos_token_id=PAD, eos_token_id=PAD))
    with (
        pytest.raises(ValueError, match="GPTJForCausalLM does not use the attention interface"),
        protect(without_interface, op),
    ):
        pass
    with pytest.raises(ValueError, match="made for .*llama.* but the model has .*gpt2"), protect(model_of("gpt2"), op):
        pass
    with pytest.raises(ValueError, match="the operator is on meta"), protect(model, copy.deepcopy(op).to("meta")):
        pass
