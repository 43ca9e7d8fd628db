"""The transform and the code of family E: a closed loop that reads what it wrote, and tells what is something else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cachemedic.token.layerwise.operator import DEAD_ZONE
from cachemedic.token.layerwise.sketch_code import SketchCode
from cachemedic.token.layerwise.transform import Transform, with_previous
from cachemedic.token.scalar_codes import cell, decode, distortion, encode, pack, unpack

P, T, D, RANK = 4, 11, 12, 5


def random_transform(seed: int = 0) -> Transform:
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(P, D, D, generator=g)).Q
    chain_in, chain_out = 0.3 * torch.randn(P, 2 * D, RANK, generator=g), 0.3 * torch.randn(P, RANK, D, generator=g)
    chain_in[0] = 0  # nothing lies below the lowest layer
    mean, first = torch.randn(2, P, D, generator=g)
    scale, variance = torch.rand(P, D, generator=g) + 0.5, torch.rand(P, D, generator=g).sort(descending=True)[0]
    return Transform(mean, scale, first, chain_in, chain_out, basis, variance)


def vectors(transform: Transform, rows: int = 3, seed: int = 1) -> torch.Tensor:
    """z [B, P, T, D] that follow the chain, with innovations of the stated variances."""
    g, z = torch.Generator().manual_seed(seed), []
    for layer in range(P):
        noise = torch.randn(rows, T, D, generator=g) * transform.variance[layer].sqrt() @ transform.basis[layer].mT
        z.append(transform.predict(layer, z[-1] if z else None, first(rows)) + noise)
    return torch.stack(z, 1)


def first(rows: int) -> torch.Tensor:
    return (torch.arange(T) == 0).expand(rows, -1)


TRANSFORM = random_transform()
Z = vectors(TRANSFORM)


def code_of(budget: int = 60, known: int = 1, coordinates: int = D) -> SketchCode:
    return SketchCode.fit(TRANSFORM, Z, first(3), known, budget, coordinates)


def slow_loop(code: SketchCode, z: torch.Tensor, known: int, codes: list[torch.Tensor] | None = None):
    """The closed loop with full vectors: prediction, innovation, codes and reconstruction of each layer; of `codes`, if
    they are given, else of z.
    """
    below = None
    for layer, (bits, spread) in enumerate(zip(code.bits, code.spread, strict=True)):
        basis = TRANSFORM.basis[layer][:, : len(bits)]
        predicted = TRANSFORM.predict(layer, below, first(len(z)))
        innovation = (z[:, layer] - predicted) @ basis
        own = encode(innovation / spread, bits) if codes is None else codes[layer]
        below = z[:, layer] if layer < known else predicted + (decode(own, bits) * spread) @ basis.mT
        yield predicted, innovation, own, below


def residuals(code: SketchCode, codes: list[torch.Tensor], z: torch.Tensor, known: int = 1):
    """What a reader of z finds at odds with the codes, by layer [B, T, m]."""
    sketch = code.understand(codes, first(len(z)), z[:, :known])
    for layer in range(P):
        innovation = (z[:, layer] - code.reconstruct(layer, sketch)[0]) @ code.basis[layer]
        yield code.residual(layer, innovation, codes[layer])


def test_standardising_is_undone_by_restoring():
    x = torch.randn(2, P, T, D, generator=torch.Generator().manual_seed(2))
    z = TRANSFORM.standardise(x)
    torch.testing.assert_close(TRANSFORM.restore(z), x)
    torch.testing.assert_close(z[1, 2, 3], (x[1, 2, 3] - TRANSFORM.mean[2]) * TRANSFORM.scale[2])


def test_a_prediction_is_one_matrix_of_the_token_below_and_the_one_before():
    below = Z[:, 1]
    predicted = TRANSFORM.predict(2, below, first(3))
    matrix = TRANSFORM.chain_in[2] @ TRANSFORM.chain_out[2]
    for t in range(1, T):
        expected = below[0, t] @ matrix[:D] + below[0, t - 1] @ matrix[D:]
        torch.testing.assert_close(predicted[0, t], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(predicted[:, 0], TRANSFORM.first[2].expand(3, -1))
    assert not with_previous(below)[:, 0, D:].any()
    lowest = TRANSFORM.predict(0, None, first(3))
    assert torch.equal(lowest[:, 0], TRANSFORM.first[0].expand(3, -1))
    assert not lowest[:, 1:].any()


@pytest.mark.parametrize("known", [0, 1, 3])
def test_reading_gives_what_writing_meant_and_both_are_the_slow_loop(known):
    code = code_of(known=known)
    codes = code.write(Z, first(3), Z[:, :known])
    packed = [unpack(pack(c, bits), bits) for c, bits in zip(codes, code.bits, strict=True)]
    sketch = code.understand(packed, first(3), Z[:, :known])
    for layer, (predicted, _, _, below) in enumerate(slow_loop(code, Z, known, codes)):
        found = code.reconstruct(layer, sketch)
        torch.testing.assert_close(found[0], predicted, rtol=1e-4, atol=1e-5)
        if layer < known:
            assert not code.bits[layer].any()
        else:
            torch.testing.assert_close(found[1], below, rtol=1e-4, atol=1e-5)
    for own, (_, _, slow, _) in zip(codes, slow_loop(code, Z, known), strict=True):
        assert (own != slow).float().mean() < 1e-3, "up to rounding at the edge of a cell"


def test_writing_token_by_token_is_writing_at_once():
    code = code_of()
    whole = code.write(Z, first(3), Z[:, :1])
    said: list[torch.Tensor | None] = [None] * P  # of the token before
    for t in range(T):
        below = None
        for layer in range(P):
            _, codes, own = code.code_layer(layer, Z[:, layer, t : t + 1], below, first(3)[:, t : t + 1])
            assert torch.equal(codes, whole[layer][:, t : t + 1])
            own = code.tell(layer, Z[:, layer, t : t + 1]) if layer == 0 else own
            below, said[layer] = own if t == 0 else torch.cat([said[layer], own], 1), own


def test_a_part_of_a_sketch_is_that_of_its_tokens():
    code = code_of()
    sketch = code.understand(code.write(Z, first(3), Z[:, :1]), first(3), Z[:, :1])
    tokens = torch.tensor([[1, 5], [2, 2], [10, 0]])
    for layer in range(P):
        whole = code.reconstruct(layer, sketch)[1]
        some = code.reconstruct(layer, sketch.at(tokens))[1]
        torch.testing.assert_close(some, torch.stack([whole[i, tokens[i]] for i in range(3)]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**20), st.permutations(range(4)))
def test_what_was_written_has_no_residual_in_any_batch(budget, seed, order):
    code, z = code_of(budget), vectors(TRANSFORM, 4, seed)
    codes = code.write(z, first(4), z[:, :1])
    assert code.bits_per_token == int(code.bits.sum()) <= budget
    for rows in (order, order[:1]):
        for residual in residuals(code, [c[rows] for c in codes], z[rows]):
            assert residual.abs().max() < DEAD_ZONE / 2


def test_what_is_something_else_has_a_residual_as_large_as_its_distance_from_the_cell():
    code = code_of(150)
    codes = code.write(Z, first(3), Z[:, :1])
    hit = Z.clone()
    hit[1, 2, 5] += 20 * TRANSFORM.basis[2][:, 0]
    for layer, residual in enumerate(residuals(code, codes, hit)):
        if layer == 2:
            assert residual[1, 5, 0] > 20 / code.spread[2, 0] - 8
            residual[1, 5] = 0
        assert residual.abs().max() < DEAD_ZONE, "predictions come from the codes, which the fault does not reach"


def test_residuals_are_signed_distances_from_cells():
    code = code_of(150)
    codes = code.write(Z, first(3), Z[:, :1])
    layer, y = 1, 4 * torch.randn(3, T, D, generator=torch.Generator().manual_seed(9))
    found = code.residual(layer, y * code.spread[layer], codes[layer])
    low, high = cell(codes[layer], code.bits[layer])
    expected = torch.where(y > high, y - high, torch.where(y < low, y - low, 0.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found > 0).any()
    assert (found < 0).any()


def test_more_bits_leave_less_error_and_the_errors_are_the_stated_ones():
    errors = []
    for budget in (0, 20, 60, 120, 200):
        code = code_of(budget)
        sketch = code.understand(code.write(Z, first(3), Z[:, :1]), first(3), Z[:, :1])
        left = [(code.reconstruct(layer, sketch)[1] - Z[:, layer])[:, 1:] for layer in range(1, P)]
        errors.append(float(torch.stack(left).square().sum(-1).mean()))
        stated = sum(float(code.uncertainty(layer).sum()) for layer in range(1, P)) / (P - 1)
        assert errors[-1] == pytest.approx(stated, rel=0.25, abs=1e-3)
    assert all(b < 0.9 * a for a, b in zip(errors, errors[1:], strict=False))


def test_bits_go_to_the_coordinates_that_vary_and_uncertainty_follows():
    code = code_of(60, known=2, coordinates=8)
    assert code.bits.shape == (P, 8)
    assert not code.bits[:2].any()
    for layer in range(2, P):
        assert code.bits[layer, 0] >= code.bits[layer, -1]
        left = torch.tensor([distortion(int(b)) for b in code.bits[layer]])
        torch.testing.assert_close(code.uncertainty(layer), code.spread[layer].square() * left, rtol=1e-4, atol=0)


def test_bits_of_one_size_go_to_the_largest_variances():
    code = SketchCode.fit(TRANSFORM, Z, first(3), known=1, budget=35, coordinates=D, bits=4)
    assert sorted(code.bits.unique().tolist()) == [0, 4]
    assert code.bits_per_token == 32
    assert not code.bits[0].any()


def test_a_transform_survives_its_file_and_a_damaged_file_is_an_error(tmp_path):
    path = tmp_path / "transform.safetensors"
    TRANSFORM.save(path)
    loaded = Transform.load(path)
    assert loaded.digest == TRANSFORM.digest
    for name, tensor in TRANSFORM.tensors().items():
        assert torch.equal(getattr(loaded, name), tensor), name
    assert random_transform(1).digest != TRANSFORM.digest
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="transform.safetensors is damaged or holds no transform"):
        Transform.load(path)
    save_file({"mean": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is damaged or holds no transform"):
        Transform.load(path)


def test_the_last_bits_of_a_first_token_do_not_choose_its_code():
    code = code_of()
    z = vectors(code.transform)
    is_first = first(len(z))
    z[:, :, 0] = code.transform.first  # the same token in every text
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5)) * 1e-6
    written, again = (code.write(x, is_first, x[:, :1]) for x in (z, z + noise))
    for one, other in zip(written, again, strict=True):
        assert torch.equal(one[:, 0], other[:, 0])
