"""Gram space against the repaired keys and values themselves."""

import pytest
import torch
from small_models import shaken
from transformers import LlamaConfig

from cachemedic.core.divergence import contraction_ratio, identity_loss
from cachemedic.repair.gram import Gram, layer_terms
from cachemedic.repair.operator import RepairOperator

SEEDS, CONDITIONS, SAMPLES, HEADS, LENGTH, DIM, LAYER = 2, 3, 4, 4, 6, 8, 1


def model_config(groups: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_key_value_heads=groups, num_hidden_layers=2,
        intermediate_size=8, vocab_size=8,
    )  # fmt: skip


def operator_of(family: str, apply_to: str = "KV", groups: int = 2) -> RepairOperator:
    runs = SEEDS * CONDITIONS
    operator = RepairOperator.create(family, model_config(groups), [0, 1], 3, apply_to, runs=runs)
    return shaken(operator).double()


def caches(groups: int = 2) -> list[torch.Tensor]:
    """Clean keys and values, corrupted keys and values, [S, B, G, T, d] each."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, SEEDS, SAMPLES, groups, LENGTH, DIM)
    k, v, k_off, v_off = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [k, v, k + 0.7 * k_off, v + 0.3 * v_off]


def query_of(queries: int) -> torch.Tensor:
    rows = SEEDS * CONDITIONS * SAMPLES
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, HEADS, queries, DIM, generator=generator, dtype=torch.float64)


def in_gram_space(operator, query, k, v, k_corr, v_corr) -> dict[str, torch.Tensor]:
    runs = SEEDS * CONDITIONS
    gate_k, gate_v = (None if g is None else g.unflatten(0, (runs, -1)) for g in operator.gates(LAYER, query))
    return layer_terms(Gram.of(k, k_corr), Gram.of(v, v_corr), operator.factors(LAYER), (gate_k, gate_v))


def materialised(operator, query, k, v, k_corr, v_corr) -> dict[str, torch.Tensor]:
    """The same by repairing every key and value for every query head and query: squared norms, mean over queries."""
    heads = HEADS // k.shape[2]

    def rows(x):  # [S, B, G, T, d] -> [R*B, G, T, d]
        return x.repeat_interleave(CONDITIONS, 0).flatten(0, 1)

    def by_query(x):  # [R*B, G, T, d] -> [R*B, H, 1, T, d]
        return x.repeat_interleave(heads, 1)[:, :, None]

    def squares(x):  # [R*B, H, M, T, d] -> [R*B], in the scale of the stored heads
        return x.square().sum((1, 3, 4)).mean(1) / heads

    k, v, k_corr, v_corr = map(rows, (k, v, k_corr, v_corr))
    k_rep, v_rep = operator.materialise(LAYER, query, k_corr, v_corr)
    left_k, left_v = (squares(x - by_query(clean)) for x, clean in ((k_rep, k), (v_rep, v)))
    moved_k, moved_v = (squares(x - by_query(corr)) for x, corr in ((k_rep, k_corr), (v_rep, v_corr)))
    found_k, found_v, size_k, size_v = (squares(by_query(x)) for x in (k_corr - k, v_corr - v, k, v))
    terms = {
        "identity": (moved_k + moved_v) / (size_k + size_v + 1e-8),
        "rho": (left_k.sqrt() + left_v.sqrt()) / (found_k.sqrt() + found_v.sqrt() + 1e-8),
        "rho_k": left_k.sqrt() / (found_k.sqrt() + 1e-8),
        "rho_v": left_v.sqrt() / (found_v.sqrt() + 1e-8),
    }
    return {name: value.unflatten(0, (SEEDS * CONDITIONS, -1)) for name, value in terms.items()}


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_gram_space_is_the_materialised_repair(family, groups, queries):
    operator, query, stored = operator_of(family, groups=groups), query_of(queries), caches(groups)
    torch.testing.assert_close(in_gram_space(operator, query, *stored), materialised(operator, query, *stored))


@pytest.mark.parametrize("apply_to", ["K", "V"])
def test_a_ratio_holds_keys_and_values_whatever_is_repaired(apply_to):
    operator, query, stored = operator_of("A", apply_to), query_of(2), caches()
    terms = in_gram_space(operator, query, *stored)
    torch.testing.assert_close(terms, materialised(operator, query, *stored))
    untouched = terms["rho_v" if apply_to == "K" else "rho_k"]
    torch.testing.assert_close(untouched, torch.ones_like(untouched))


def test_one_query_and_ungrouped_heads_give_the_canonical_terms():
    operator, query, stored = operator_of("A", groups=HEADS), query_of(1), caches(HEADS)
    terms = in_gram_space(operator, query, *stored)
    k, v, k_corr, v_corr = (x.repeat_interleave(CONDITIONS, 0).flatten(0, 1) for x in stored)
    k_rep, v_rep = (x[:, :, 0] for x in operator.materialise(LAYER, query, k_corr, v_corr))
    rho = contraction_ratio(k, v, k_corr, v_corr, k_rep, v_rep)
    torch.testing.assert_close(terms["rho"].flatten(), rho)
    k_rep, v_rep = (x[:, :, 0] for x in operator.materialise(LAYER, query, k, v))
    clean = in_gram_space(operator, query, *stored[:2], *stored[:2])
    torch.testing.assert_close(clean["identity"].flatten(), identity_loss(k, v, k_rep, v_rep))


@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_gradients_are_those_of_the_materialised_repair(family):
    operator, query, stored = operator_of(family), query_of(2), caches()
    gradients = []
    for terms in (in_gram_space(operator, query, *stored), materialised(operator, query, *stored)):
        operator.zero_grad()
        (terms["identity"] + terms["rho"]).sum().backward()
        gradients.append([p.grad.clone() for p in operator.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_sound_tensor_has_no_ratio_and_the_identity_has_a_finite_gradient():
    k, v, k_corr, _ = caches()
    operator = RepairOperator.create("A", model_config(2), [0, 1], 3, runs=SEEDS * CONDITIONS).double()
    terms = in_gram_space(operator, query_of(1), k, v, k_corr, v)
    torch.testing.assert_close(terms["rho_k"], torch.ones_like(terms["rho_k"]))
    assert terms["rho_v"].isnan().all()
    clean = in_gram_space(operator, query_of(1), k, v, k, v)
    assert (clean["identity"] == 0).all()
    (terms["rho"] + clean["identity"] + clean["rho"]).sum().backward()
    assert all(p.grad.isfinite().all() for p in operator.parameters())
