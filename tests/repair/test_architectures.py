"""Every architecture against an independent slow reference: attention over the repaired cache of each query."""

import copy

import pytest
import torch
import transformers as hf
from small_models import CONFIGS, VOCABULARY, model_of, operator_for, padded_batch, prefill_and_decode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from cachemedic.repair.attach import protect
from cachemedic.repair.operator import RepairOperator

REFERENCE = "materialised_reference"


@pytest.fixture
def reference(monkeypatch):
    """Makes a twin of a model whose attention forms the repaired keys and values of each query, in loops."""

    def attach(model, op):
        def attention(module, query, key, value, mask, scaling=None, **_):
            output = torch.empty_like(query)
            repeats = query.shape[1] // key.shape[1]
            protected = module.layer_idx in op.layers
            gates = op.gates(module.layer_idx, query) if protected else (None, None)
            factors = op.factors(module.layer_idx) if protected else {}
            for row in range(query.shape[0]):
                run = row // (query.shape[0] // op.runs)
                for head in range(query.shape[1]):
                    for i in range(query.shape[2]):
                        k, v = (x[row, head // repeats].double() for x in (key, value))
                        if gates[0] is not None:
                            w, u = ((f[run] if f.dim() == 3 else f[run, head]).double() for f in factors["k"])
                            k = k + (k @ w * gates[0][row, head, i].double()) @ u.T
                        if gates[1] is not None:
                            w, u = ((f[run] if f.dim() == 3 else f[run, head]).double() for f in factors["v"])
                            v = v + (v @ w * gates[1][row, head, i].double()) @ u.T
                        logits = k @ query[row, head, i].double() * scaling + mask[row, 0, i]
                        output[row, head, i] = (torch.softmax(logits, dim=0) @ v).float()
            return output.transpose(1, 2), None

        monkeypatch.setitem(AttentionInterface._global_mapping, REFERENCE, attention)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, REFERENCE, eager_mask)
        twin = copy.deepcopy(model)
        twin.set_attn_implementation(REFERENCE)
        return twin

    return attach


def assert_agree(found, expected, plain):
    assert (expected - plain).abs().max() > 0.1, "the repair must matter for the comparison to mean anything"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_agrees_with_the_materialised_reference(name, implementation, reference):
    model = model_of(name, implementation)
    op = operator_for(model)
    ids, mask = padded_batch()
    plain = prefill_and_decode(model, ids, mask)
    with protect(model, op), torch.no_grad():
        repaired = prefill_and_decode(model, ids, mask)
    assert_agree(repaired, prefill_and_decode(reference(model, op), ids, mask), plain)


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_agrees_with_the_materialised_reference(name, reference):
    model = model_of(name)
    op = operator_for(model)
    ids, mask = padded_batch(rows=2)
    arguments = {
        "attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with protect(model, op):
        found = model.generate(ids, **arguments)
    expected = reference(model, op).generate(ids, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "apply_to", "options"),
    [("A", "K", {}), ("A", "V", {"share_heads": False}), ("B", "KV", {}), ("C", "KV", {"head_embedding": True})],
)
@pytest.mark.parametrize("runs", [1, 3])
def test_every_family_agrees_with_the_materialised_reference(family, apply_to, options, runs, reference):
    model = model_of("llama")
    op = operator_for(model, family, apply_to=apply_to, runs=runs, size=0.6, **options)
    ids, mask = padded_batch()
    plain = prefill_and_decode(model, ids, mask)
    with protect(model, op), torch.no_grad():
        repaired = prefill_and_decode(model, ids, mask)
    assert_agree(repaired, prefill_and_decode(reference(model, op), ids, mask), plain)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_a_new_operator_changes_no_bit_of_the_logits(name, family):
    for implementation in ("sdpa", "eager"):
        model = model_of(name, implementation)
        ids, mask = padded_batch()
        plain = prefill_and_decode(model, ids, mask)
        with protect(model, RepairOperator.create(family, model.config, [0, 1, 2], rank=3)):
            assert torch.equal(prefill_and_decode(model, ids, mask), plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_future_token_moves_no_earlier_logit(name, implementation):
    model = model_of(name, implementation)
    ids, _ = padded_batch(rows=2)
    ids[:, 0] = 5
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCABULARY
    with protect(model, operator_for(model)), torch.no_grad():
        a, b = model(ids).logits, model(changed).logits
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


UNSUITABLE = {
    "bart has an encoder": lambda: hf.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1),
    "deepseek_v3 has multi-head latent attention": hf.DeepseekV3Config,
    "mimo_v2_flash has keys of 192 numbers a head and values of 128": hf.MiMoV2FlashConfig,
}


@pytest.mark.parametrize("reason", UNSUITABLE)
def test_models_that_no_operator_fits_are_refused(reason):
    with pytest.raises(ValueError, match=f"^{reason}.*: choose a model"):
        RepairOperator.create("A", UNSUITABLE[reason](), [0])
