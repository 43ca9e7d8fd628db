"""Calibration on tiny bases: gradients against finite differences, statistics against plain sums."""

from dataclasses import replace

import pytest
import torch
from tiny import DOCUMENTS
from tiny_repair import base_of, random_ids
from tiny_training import tiny_base
from transformers import DynamicCache, GlmConfig, GlmForCausalLM

from cachemedic.data import text_source
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.repair.operator import RepairOperator
from cachemedic.token.layerwise import calibration, learned_basis
from cachemedic.token.layerwise.calibration import CleanVectors, calibrate, fisher_diagonal, fit_transform, vectors_of
from cachemedic.token.layerwise.token_vectors import KeyRotation, join, split
from cachemedic.token.layerwise.transform import with_previous

BOTH = pytest.mark.parametrize("architecture", ["gpt2", "llama"])
LAYERS = (0, 1, 2)


def windows_of(architecture: str, rows: int = 12, length: int = 48) -> CleanVectors:
    return vectors_of(base_of(architecture), random_ids(rows, length))


@BOTH
def test_clean_vectors_are_those_of_each_window_alone(architecture):
    base, windows = base_of(architecture), windows_of(architecture, 10, 12)
    for row in (0, 9):
        cache = DynamicCache()
        base.model(windows.ids[row : row + 1], past_key_values=cache)
        key, value = stack_cache(cache)
        x = KeyRotation(base.model).at(windows.positions[row : row + 1]).undo(join(key, value))
        torch.testing.assert_close(windows.x[row], x[0], rtol=1e-4, atol=1e-5)
        assert windows.positions[row].tolist() == list(range(12))


@BOTH
def test_the_fisher_diagonal_is_the_mean_of_squared_derivatives(architecture, monkeypatch):
    """One number of one token in one example at a time, by central differences."""
    base, text = base_of(architecture), random_ids(2, 3 + 32, seed=5)
    real, drawn = torch.multinomial, []
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    found = fisher_diagonal(base, text)
    tokens = torch.cat(drawn).view(2, 32, 1)
    vectors, rotation = vectors_of(base, text[:, :3]), KeyRotation(base.model)
    turn, heads = rotation.at(vectors.positions), 4 if architecture == "gpt2" else 2

    def log_p(x: torch.Tensor) -> torch.Tensor:  # [2]
        stored = unstack_cache(*split(turn.redo(x), heads))
        with torch.no_grad():
            logits = base.model(text[:, 3:], past_key_values=stored).logits
        return logits.double().log_softmax(-1).gather(-1, tokens).sum((1, 2))

    width = vectors.x.shape[-1]
    for layer, d in ((0, 1), (1, 0), (1, width - 1), (2, 9), (2, width // 2)):
        total = 0.0
        for t in (1, 2):  # the first position is left out
            step = torch.zeros_like(vectors.x)
            step[:, layer, t, d] = 1e-2
            total += ((log_p(vectors.x + step) - log_p(vectors.x - step)) / 2e-2).square().sum().item()
        assert found[layer, d].item() == pytest.approx(total / (2 * 32 * 2), rel=0.02)
    torch.testing.assert_close(fisher_diagonal(base, text), found, rtol=0, atol=0)


@BOTH
def test_a_transform_has_the_statistics_of_the_vectors(architecture):
    base, windows = base_of(architecture), windows_of(architecture)
    transform = fit_transform(base, windows, LAYERS, text=windows.ids)
    z = transform.standardise(windows.x)
    inner = z[:, :, 1:]
    assert inner.mean((0, 2)).abs().max() < 1e-3
    torch.testing.assert_close(transform.first, z[:, :, 0].mean(0))
    by_head = transform.scale.unflatten(1, (-1, 8))
    assert torch.equal(by_head, by_head[..., :1].expand_as(by_head)), "one scale a head: it commutes with the rotation"
    eye = torch.eye(transform.width).expand(3, -1, -1)
    torch.testing.assert_close(transform.basis.mT @ transform.basis, eye, rtol=0, atol=2e-3)
    assert not transform.chain_in[0].any()
    is_first = windows.positions == 0
    for layer in LAYERS:
        below = z[:, layer - 1] if layer else None
        innovation = (z[:, layer] - transform.predict(layer, below, is_first))[:, 1:].reshape(-1, transform.width)
        variance = (innovation @ transform.basis[layer]).square().mean(0)
        torch.testing.assert_close(transform.variance[layer], variance, rtol=0.02, atol=1e-4)
        assert (transform.variance[layer].diff() <= 1e-5).all(), "principal axes come by falling variance"
        assert variance.sum() <= inner[:, layer].square().mean((0, 1)).sum() * 1.001
        if layer:
            x, y = (a[:, 1:].reshape(-1, a.shape[-1]) for a in (with_previous(below), z[:, layer]))
            ridge = torch.linalg.solve(x.T @ x + calibration.RIDGE * torch.eye(x.shape[1]), x.T @ y)
            assert innovation.square().sum() == pytest.approx((y - x @ ridge).square().sum().item(), rel=0.01)


def test_a_chain_of_low_rank_is_the_best_one_for_its_rank(monkeypatch):
    base, windows = base_of("llama"), windows_of("llama")
    full = fit_transform(base, windows, LAYERS, text=windows.ids)
    monkeypatch.setattr(calibration, "CHAIN_RANK", 5)
    low = fit_transform(base, windows, LAYERS, text=windows.ids)
    assert low.chain_in.shape == (3, 64, 5)
    z, is_first = low.standardise(windows.x), windows.positions == 0
    predicted = {name: t.predict(1, z[:, 0], is_first)[:, 1:].reshape(-1, 32) for name, t in (("5", low), ("32", full))}
    tail = torch.linalg.svdvals(predicted["32"])[5:].square().sum()  # Eckart and Young
    assert (predicted["5"] - predicted["32"]).square().sum().item() == pytest.approx(tail.item(), rel=0.02)


def test_heads_that_matter_more_weigh_more(monkeypatch):
    base, windows = base_of("gpt2"), windows_of("gpt2")
    plain = fit_transform(base, windows, LAYERS, text=windows.ids)
    fisher = fisher_diagonal(base, windows.ids)
    fisher[1, 8:16] *= 81.0
    monkeypatch.setattr(calibration, "fisher_diagonal", lambda *args: fisher)
    heavier = fit_transform(base, windows, LAYERS).scale[1] / plain.scale[1]
    torch.testing.assert_close(heavier[8:16] / heavier[16:24], torch.full((8,), 3.0))


def test_random_axes_are_orthonormal_and_depend_on_the_seed_alone():
    base, windows = base_of("llama"), windows_of("llama")
    axes = [fit_transform(base, windows, LAYERS, "random", seed, windows.ids).basis for seed in (0, 0, 1)]
    assert torch.equal(axes[0], axes[1])
    assert not torch.equal(axes[0], axes[2])
    torch.testing.assert_close(axes[0].mT @ axes[0], torch.eye(32).expand(3, -1, -1), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="projection must be 'principal' or 'random', not 'dct'"):
        fit_transform(base, windows, LAYERS, "dct")


@pytest.fixture
def short_texts(monkeypatch):
    """Calibration on little of the tiny documents."""
    monkeypatch.setattr(text_source, "documentation", lambda split: tuple(DOCUMENTS))
    few = {"DOCUMENTATION_SAMPLES": 8, "REVIEW_SAMPLES": 4, "REVIEWS": 60, "FISHER_SAMPLES": 4}
    for name, value in (few | {"CALIBRATION_LENGTH": 40, "FISHER_PREFIX": 20, "FISHER_DECODED": 8}).items():
        monkeypatch.setattr(calibration, name, value)


@pytest.mark.usefixtures("short_texts")
@pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])
def test_calibration_by_itself_is_repeatable_and_keeps_to_the_budget(family):
    base = base_of("llama")
    options = {"share": 0.1} if family == "layerwise-E" else {}
    first, again = (
        calibrate(RepairOperator.create(family, base.model.config, (0, 2), **options), base) for _ in range(2)
    )
    assert first.transform.digest == again.transform.digest
    assert (first.transform.num_layers, first.transform.width) == (2, 32)
    assert (first.code is None) == (family == "layerwise-D")
    if first.code is not None:
        assert 0 < first.code.bits_per_token <= 0.1 * 16 * 2 * 32
        assert not first.code.bits[0].any(), "the lowest layer follows from the ids"
        assert torch.equal(first.code.bits, again.code.bits)
        assert torch.equal(first.code.spread, again.code.spread)


@pytest.mark.parametrize("part", ["o_proj", "v_proj"])
def test_a_head_that_nothing_reads_or_writes_leaves_the_scrub_finite(part, monkeypatch):
    """Pruned models have such heads: their share of the output, or their size, is zero."""
    base = tiny_base("llama")
    attention = base.model.model.layers[1].self_attn
    with torch.no_grad():
        if part == "o_proj":
            attention.o_proj.weight[:, :16] = 0  # the two query heads of key/value head 0
        else:
            attention.v_proj.weight[:8] = 0
    windows = vectors_of(base, random_ids(12, 48))
    transform = fit_transform(base, windows, LAYERS, text=windows.ids)
    assert (transform.scale.isfinite() & (transform.scale > 0)).all()
    torch.testing.assert_close(transform.restore(transform.standardise(windows.x)), windows.x, rtol=1e-3, atol=1e-3)


@BOTH
def test_a_scale_that_cannot_be_undone_is_refused(architecture):
    windows = windows_of(architecture)
    transform = fit_transform(base_of(architecture), windows, LAYERS, text=windows.ids)
    for wrong in (0.0, float("nan"), float("inf")):
        scale = transform.scale.clone()
        scale[1, 2] = wrong
        with pytest.raises(ValueError, match="finite and above zero"):
            replace(transform, scale=scale)


def test_axes_of_a_part_of_the_layers_can_be_learned(monkeypatch):
    monkeypatch.setattr(text_source, "documentation", lambda split: tuple(4 * document for document in DOCUMENTS))
    monkeypatch.setattr(learned_basis, "STEPS", 2)
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_base("llama")
        base.model.to(dtype)
        operator = RepairOperator.create("layerwise-E", base.model.config, (1, 2), projection="learned", share=0.25)
        calibrate(operator, base, vectors_of(base, random_ids(12, 48)))
        assert operator.transform.num_layers == 2
        eye = torch.eye(operator.transform.width).expand(2, -1, -1)
        torch.testing.assert_close(operator.transform.basis.mT @ operator.transform.basis, eye, rtol=0, atol=5e-3)


def test_windows_too_short_for_the_sensitivity_are_refused():
    base = base_of("llama")
    operator = RepairOperator.create("layerwise-D", base.model.config, LAYERS)
    with pytest.raises(ValueError, match="windows of 33 tokens are too short to calibrate on: allowed are 34 or more"):
        calibrate(operator, base, vectors_of(base, random_ids(4, 33)))


def test_a_model_that_pairs_the_numbers_of_a_key_differently_is_refused():
    """Its angles look like those of Llama: only its keys tell."""
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    base = replace(base_of("llama"), model=GlmForCausalLM(config).eval(), name="glm")
    operator = RepairOperator.create("layerwise-D", config, (0, 1))
    with pytest.raises(ValueError, match="does not rotate number i of a key with number i"):
        calibrate(operator, base, vectors_of(base, random_ids(4, 48)))
