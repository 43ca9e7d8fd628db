import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import shaken
from transformers import LlamaConfig

from cachemedic.repair.folded import InwardClamp
from cachemedic.repair.operator import RepairOperator

LLAMA = LlamaConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    intermediate_size=64,
    vocab_size=50,
)
VARIANTS = [
    ("A", {}),
    ("A", {"share_heads": False}),
    ("B", {}),
    ("B", {"share_heads": False}),
    ("C", {}),
    ("C", {"head_embedding": True}),
]


def attention_inputs(rows=2, heads=4, groups=2, queries=3, length=5, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, queries, dim), (rows, groups, length, dim), (rows, groups, length, dim)]
    return [torch.randn(s, generator=generator) for s in shapes]


def attend(query, key, value):
    """Attention with keys and values of each query and head: [B, H, M, d] and twice [B, H, M, T, d] -> [B, H, M, d]."""
    weights = torch.softmax((key @ query[..., None]).squeeze(-1), dim=-1)
    return (weights[..., None, :] @ value).squeeze(-2)


def stored(x, heads, queries):
    return x.repeat_interleave(heads // x.shape[1], dim=1)[:, :, None].expand(-1, -1, queries, -1, -1)


@pytest.mark.parametrize("apply_to", ["K", "V", "KV"])
@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_a_new_operator_is_the_exact_identity(family, options, apply_to):
    op = RepairOperator.create(family, LLAMA, layers=[0, 2], rank=4, apply_to=apply_to, runs=2, **options)
    q, k, v = attention_inputs()
    for layer in op.layers:
        gates = op.gates(layer, q)
        assert torch.equal(op.fold_query(layer, q, gates), q)
        assert torch.equal(op.fold_output(layer, q, gates), q)
        k_hat, v_hat = op.materialise(layer, q, k, v)
        assert torch.equal(k_hat, stored(k, 4, 3))
        assert torch.equal(v_hat, stored(v, 4, 3))
        assert [g is not None for g in gates] == ["K" in apply_to, "V" in apply_to]


@settings(max_examples=30)
@given(
    variant=st.sampled_from(VARIANTS),
    apply_to=st.sampled_from(["K", "V", "KV"]),
    rank=st.integers(1, 16),
    runs=st.integers(1, 3),
    samples=st.integers(1, 2),
    queries=st.integers(1, 3),
    length=st.integers(1, 5),
)
def test_the_fold_equals_attention_over_the_materialised_cache(variant, apply_to, rank, runs, samples, queries, length):
    family, options = variant
    op = shaken(RepairOperator.create(family, LLAMA, [0, 1], rank, apply_to, runs=runs, **options)).double()
    q, k, v = (x.double() for x in attention_inputs(rows=runs * samples, queries=queries, length=length))
    gates = op.gates(1, q)
    o = attend(op.fold_query(1, q, gates), stored(k, 4, queries), stored(v, 4, queries))
    torch.testing.assert_close(op.fold_output(1, o, gates), attend(q, *op.materialise(1, q, k, v)))


@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_the_materialised_form_is_the_published_formula(family):
    """Loops over runs, samples, heads and queries, from the parameters alone."""
    op = shaken(RepairOperator.create(family, LLAMA, [1, 2], rank=4, runs=2)).double()
    q, k, v = (x.double() for x in attention_inputs(rows=4))
    repaired = op.materialise(2, q, k, v)
    shared = int(family == "C")
    for row in range(4):
        run, place = row // 2, 1 - shared
        for head in range(4):
            for i in range(3):
                hidden = torch.tanh(q[row, head, i] @ op.gate_in[run, place] + op.gate_bias[run, 1, 0])
                z = hidden @ op.gate_out[run, place] + op.gate_out_bias[run, place, 0]
                for side, z_side, x, x_hat in zip("kv", z.split(4), (k, v), repaired, strict=True):
                    x = x[row, head // 2]
                    if family == "B":
                        basis = torch.linalg.qr(getattr(op, f"basis_{side}")[run, place]).Q
                        expected = x - (x @ basis * (1 - z_side.clamp(0, 1))) @ basis.T
                    else:
                        w, u = getattr(op, f"w_{side}")[run, place], getattr(op, f"u_{side}")[run, place]
                        expected = x + (x @ w * torch.sigmoid(z_side)) @ u.T
                    torch.testing.assert_close(x_hat[row, head, i], expected)


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_gradients_of_the_fold_are_those_of_the_materialised_form(family, options):
    op = shaken(RepairOperator.create(family, LLAMA, [1], rank=3, **options)).double()
    q, k, v = (x.double() for x in attention_inputs())
    gates = op.gates(1, q)
    folded = op.fold_output(1, attend(op.fold_query(1, q, gates), stored(k, 4, 3), stored(v, 4, 3)), gates)
    direct = attend(q, *op.materialise(1, q, k, v))
    gradients = [torch.autograd.grad(x.square().sum(), list(op.parameters())) for x in (folded, direct)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_a_stack_of_runs_equals_its_runs_one_by_one(family, options):
    op = shaken(RepairOperator.create(family, LLAMA, [0, 1], rank=4, runs=3, **options))
    q, k, v = attention_inputs(rows=6)
    together = op.materialise(1, q, k, v)
    for run in range(3):
        rows = slice(2 * run, 2 * run + 2)
        alone = op.select(run).materialise(1, q[rows], k[rows], v[rows])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[rows], b)
    restacked = RepairOperator.stack([op.select(run) for run in range(3)])
    assert restacked.config == op.config
    for a, b in zip(op.parameters(), restacked.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["A", "B", "C"])
def test_the_start_of_a_run_depends_on_its_seed_alone(family):
    alone = RepairOperator.create(family, LLAMA, [0, 1], seed=7)
    stacked = RepairOperator.create(family, LLAMA, [0, 1], seed=[3, 7], runs=2)
    consecutive = RepairOperator.create(family, LLAMA, [0, 1], seed=6, runs=2)
    for name, p in alone.named_parameters():
        assert torch.equal(p[0], stacked.get_parameter(name)[1])
        assert torch.equal(p[0], consecutive.get_parameter(name)[1])
        assert p.shape[1:] == stacked.get_parameter(name).shape[1:]


def test_b_never_expands_and_its_basis_is_orthonormal():
    op = shaken(RepairOperator.create("B", LLAMA, [0], rank=8), size=2.0)
    q, k, v = attention_inputs()
    for w, u in op.factors(0).values():
        torch.testing.assert_close(w.mT @ w, torch.eye(8).expand(1, 8, 8))
        assert torch.equal(u, -w)
    for x, x_hat in zip((k, v), op.materialise(0, q, k, v), strict=True):
        assert (x_hat.norm(dim=-1) <= stored(x, 4, 3).norm(dim=-1) * (1 + 1e-5)).all()


def test_b_leaves_the_identity_by_gradient_descent():
    op = RepairOperator.create("B", LLAMA, [0], rank=8)
    q, k, v = attention_inputs()
    optimizer = torch.optim.Adam(op.parameters(), lr=0.05)
    sizes = []
    for _ in range(30):
        loss = sum(x.square().sum() for x in op.materialise(0, q, k, v))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sizes.append(float(loss.detach()))
    assert sizes[-1] < 0.8 * sizes[0]


def test_inward_clamp_passes_only_gradients_that_lead_inward():
    x = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    assert InwardClamp.apply(x).tolist() == [0, 0, 0.5, 1, 1]
    assert torch.autograd.grad(InwardClamp.apply(x).sum(), x)[0].tolist() == [0, 0, 1, 1, 1]  # descent lowers x
    assert torch.autograd.grad(-InwardClamp.apply(x).sum(), x)[0].tolist() == [-1, -1, -1, 0, 0]  # descent raises x


def test_c_is_one_operator_whose_gate_knows_the_layer_and_the_head():
    few, many = (RepairOperator.create("C", LLAMA, range(n), rank=4, head_embedding=True) for n in (1, 3))
    sizes = [sum(p.numel() for p in operator.parameters()) for operator in (few, many)]
    assert sizes[1] - sizes[0] == 2 * 8  # two more layer embeddings of the gate's width
    q = attention_inputs(heads=1)[0].expand(-1, 4, -1, -1)
    a0, a1 = many.gates(0, q)[0], many.gates(1, q)[0]
    assert not torch.allclose(a0, a1)
    assert not torch.allclose(a0[:, 0], a0[:, 1])
    for side in "kv":
        for a, b in zip(many.factors(0)[side], many.factors(2)[side], strict=True):
            assert torch.equal(a, b)


def test_half_precision_queries_meet_full_precision_parameters():
    op = shaken(RepairOperator.create("A", LLAMA, [0]))
    q = attention_inputs()[0]
    low = q.bfloat16()
    folded = op.fold_query(0, low, op.gates(0, low))
    assert folded.dtype == torch.bfloat16
    torch.testing.assert_close(folded.float(), op.fold_query(0, q, op.gates(0, q)), atol=0.05, rtol=0.05)


def test_rows_that_do_not_divide_among_the_runs_are_refused():
    op = RepairOperator.create("A", LLAMA, [0], runs=2)
    with pytest.raises(ValueError, match="3 batch rows do not divide among the 2 runs"):
        op.gates(0, attention_inputs(rows=3)[0])
    with pytest.raises(ValueError, match="run 2 is out of range"):
        op.select(2)
    with pytest.raises(ValueError, match="one definition"):
        RepairOperator.stack([op, RepairOperator.create("A", LLAMA, [1])])
