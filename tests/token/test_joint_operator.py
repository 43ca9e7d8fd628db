"""Families D and E under a joint model: what is told, estimated, kept and saved."""

import json
import os
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from joint_operators import joint_of
from small_models import CONFIGS, VOCABULARY, model_of
from tiny import DOCUMENTS, tiny_model, tiny_tokenizer
from transformers import DynamicCache

from cachemedic.core import threads as threads_module
from cachemedic.models.cache import stack_cache, unstack_cache
from cachemedic.models.load import Base
from cachemedic.repair.config import OperatorConfig
from cachemedic.repair.operator import RepairOperator
from cachemedic.token import joint_calibrate, joint_calibration, principal_axes, prior_fit
from cachemedic.token.joint_calibration import fit_joint_model
from cachemedic.token.joint_operator import SketchAssisted, TokenAware
from cachemedic.token.plausible import check_cache, statistics, thresholds
from cachemedic.token.trust_fit import fit_trust
from cachemedic.token.vectors import TokenVectors

LENGTH = 40


def operator(cls=SketchAssisted, name="llama", layers="all", runs=1, attached=True, **options):
    config = CONFIGS[name]()
    depth = config.num_hidden_layers
    options = ({"share": 0.02} if cls is SketchAssisted else {}) | options
    definition = RepairOperator.create("A", config, layers, 8, runs=runs).config
    options = cls.default_options | options
    definition = OperatorConfig(
        "E" if cls is SketchAssisted else "D", tuple(range(depth)), 8, "KV", runs, definition.model, options
    )
    parameters = [cls.initial_parameters(definition, torch.Generator().manual_seed(run)) for run in range(runs)]
    result = cls(definition, {key: torch.stack([p[key] for p in parameters]) for key in parameters[0]})
    if attached:
        result.set_joint(joint_of(name), {"restore": 0.5})
    return result


@pytest.fixture(params=["llama", "gpt2"])
def clean(request):
    model = model_of(request.param)
    ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    return request.param, model, ids, torch.arange(LENGTH).expand(2, -1), *stack_cache(cache)


def error(found, keys, values):
    return sum(float((new.detach() - old).square().sum()) for new, old in zip(found, (keys, values), strict=True))


def noisy(x, size=0.7):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    return x + size * noise * x.square().mean(-1, keepdim=True).sqrt()


def test_untrained_it_repairs(clean):
    name, model, ids, positions, keys, values = clean
    op = operator(name=name)
    kept = op.write_tokens(model, keys, values, ids, positions)
    bad = noisy(keys), noisy(values)
    restored = op.repair(model, *bad, ids, positions, kept, way="restore")
    estimated = op.repair(model, *bad, ids, positions, kept)
    assert error(estimated, keys, values) < error(restored, keys, values) < error(bad, keys, values)


def test_without_bytes_it_repairs_noise(clean):
    name, model, ids, positions, keys, values = clean
    bad = noisy(keys), noisy(values)
    for with_ids in (True, False):
        op = operator(TokenAware, name, with_ids=with_ids)
        assert op.write_tokens(model, keys, values, ids, positions) is None
        assert error(op.repair(model, *bad, ids, positions), keys, values) < error(bad, keys, values)


def test_sound_parts_keep_every_bit_and_help(clean):
    name, model, ids, positions, keys, values = clean
    op = operator(name=name)
    kept = op.write_tokens(model, keys, values, ids, positions)
    bad_keys, bad_values = keys.clone(), values.clone()
    bad_keys[:, 1, :, 10:], bad_values[:, 1, :, 10:] = torch.nan, 1e30
    found = op.repair(model, bad_keys, bad_values, ids, positions, kept)
    for new, old in zip(found, (keys, values), strict=True):
        assert torch.equal(new[:, ::2], old[:, ::2])
        assert torch.equal(new[:, 1, :, :10], old[:, 1, :, :10])
    restored = op.repair(model, bad_keys, bad_values, ids, positions, kept, way="restore")
    assert error([x[:, 1:2] for x in found], keys[:, 1:2], values[:, 1:2]) < error(
        [x[:, 1:2] for x in restored], keys[:, 1:2], values[:, 1:2]
    )


def test_runs_repair_their_own_rows(clean):
    name, model, ids, positions, keys, values = clean
    both = operator(name=name, runs=2)
    with torch.no_grad():
        both.trust_bias[1] = 0.3
    bad = [noisy(x).repeat(2, 1, 1, 1, 1) for x in (keys, values)]
    twice = ids.repeat(2, 1), positions.repeat(2, 1)
    kept = both.write_tokens(model, keys.repeat(2, 1, 1, 1, 1), values.repeat(2, 1, 1, 1, 1), *twice)
    together = both.repair(model, *bad, *twice, kept)
    for run in range(2):
        alone = both.select(run)
        kept_one = alone.write_tokens(model, keys, values, ids, positions)
        expected = alone.repair(model, bad[0][:2], bad[1][:2], ids, positions, kept_one)
        for side, one in zip(together, expected, strict=True):
            torch.testing.assert_close(side[2 * run : 2 * run + 2], one, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together[0][:2], together[0][2:])


def test_files_share_the_joint_model(tmp_path):
    first, second = operator(), operator(TokenAware)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    name = next((tmp_path / "first").glob("joint-*.safetensors")).name
    (tmp_path / "first" / name).rename(tmp_path / name)
    (tmp_path / "second" / name).unlink()
    for folder, saved in (("first", first), ("second", second)):
        found = type(saved)(saved.config, dict(saved.named_parameters()))
        record = json.loads((tmp_path / folder / "config.json").read_text())
        found._read_beside(tmp_path / folder, record["statistics"])
        assert found.digest == saved.digest
        assert found.expected_kl == {"restore": 0.5}
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="joint model"):
        first._read_beside(tmp_path / "first", record["statistics"])


def test_what_is_refused():
    with pytest.raises(ValueError, match="calibrate"):
        _ = operator(attached=False).calibrated
    with pytest.raises(ValueError, match="does not fit"):
        operator().set_joint(joint_of("gpt2"))
    with pytest.raises(ValueError, match="rounds"):
        operator(rounds=0)
    with pytest.raises(ValueError, match="share"):
        operator(share=3.0)
    with pytest.raises(ValueError, match="all"):
        RepairOperator.create("A", CONFIGS["llama"](), layers="most")


def test_a_share_may_be_a_fraction(tmp_path):
    made = RepairOperator.create("E", CONFIGS["llama"](), layers="all", share=Fraction(1, 4))
    made.save_pretrained(tmp_path)
    assert RepairOperator.from_pretrained(tmp_path).config.options["share"] == 0.25


def test_too_little_text_is_refused_before_the_long_work(monkeypatch):
    base = Base(tiny_model("llama"), tiny_tokenizer(), "tiny")
    monkeypatch.setattr(joint_calibrate, "fit_joint_model", lambda *_, **__: pytest.fail("the long work began"))
    with pytest.raises(ValueError, match="give more text"):
        joint_calibrate.calibrate(RepairOperator.create("E", base.config, layers="all"), base, ["too short"] * 24)


def test_tokens_that_do_not_follow_from_their_ids(clean):
    name, model, ids, positions, keys, values = clean
    op = operator(TokenAware, name)
    rows = torch.randint(1, VOCABULARY, (20, LENGTH), generator=torch.Generator().manual_seed(8))
    cache = DynamicCache()
    model(rows, past_key_values=cache)
    op.alarms = thresholds(statistics(model, op, *stack_cache(cache), rows)[0])
    sound = check_cache(model, op, unstack_cache(keys, values), ids)
    assert sound.suspicious.float().mean() < 0.1
    assert sound.rate == 0.01
    exchanged = [x.clone() for x in (keys, values)]
    for old, new in zip((keys, values), exchanged, strict=True):
        new[0, ..., 8:20, :] = old[1, ..., 8:20, :]
    found = check_cache(model, op, unstack_cache(*exchanged), ids)
    assert found.suspicious[0, 8:20].float().mean() > 0.9
    assert (0, 10) in found.tokens
    for huge in (3e38, torch.inf, torch.nan):
        flipped = keys.clone()
        flipped[0, 1, 0, 10] = huge
        found = check_cache(model, op, unstack_cache(flipped, values), ids)
        assert found.suspicious[0, 10]
        assert not found.score.isnan().any()
    with pytest.raises(ValueError, match="rate"):
        check_cache(model, op, unstack_cache(keys, values), ids, rate=0.2)
    for other in (torch.zeros(2, 2), torch.tensor([]), 1):
        with pytest.raises(TypeError, match="rate must be a float"):
            check_cache(model, op, unstack_cache(keys, values), ids, rate=other)
    with pytest.raises(ValueError, match="ids"):
        check_cache(model, op, unstack_cache(keys, values), ids[:, 1:])


def test_trust_learns_not_to_believe_another_token(clean):
    name, model, ids, positions, keys, values = clean
    op = operator(name=name)
    exchanged = keys.roll(1, 0), values.roll(1, 0)
    kept = op.write_tokens(model, keys, values, ids, positions)
    before = error(op.repair(model, *exchanged, ids, positions, kept), keys, values)
    rows = torch.randint(1, VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(9))
    fit_trust(op, model, rows, ("gaussian", "contiguous_overwrite"))
    assert error(op.repair(model, *exchanged, ids, positions, kept), keys, values) < before


def test_a_joint_model_does_not_depend_on_the_number_of_threads(monkeypatch):
    base, before = Base(tiny_model("llama"), tiny_tokenizer(), "tiny"), torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name, number in {"BLOCK": 64, "PART": 16, "COLUMNS": 16}.items():  # of which a tiny base then has several
        for module in (joint_calibration, prior_fit, principal_axes):
            monkeypatch.setattr(module, name, number)
    digests = []
    for count, threads in ((1, 1), (1, 2), (3, 2)):
        monkeypatch.setattr(threads_module, "WORKERS", count)
        torch.set_num_threads(threads)
        digests.append(fit_joint_model(base, 6 * DOCUMENTS).digest)
    torch.set_num_threads(before)
    assert digests[0] == digests[1] == digests[2]


def test_what_has_no_bits_is_what_the_ids_tell(clean):
    name, model, ids, positions, keys, values = clean
    op = operator(name=name)
    joint, prior = op.calibrated, op.prior(model, ids, positions)
    x = TokenVectors(model).of(keys.unbind(1), values.unbind(1), positions)
    restored = joint.reconstruct(op.code.decode(op.code.encode(x, prior)), prior)
    coded = joint.axes[: len(op.code.bits)].float()
    beside = (joint.standardise(restored) - joint.expand_prior(prior)) @ (torch.eye(joint.dim) - coded.T @ coded)
    others = joint.dim // len(op.layers)  # behind the lowest layer, which the ids tell exactly
    assert 0 < len(coded) < joint.coordinates
    assert joint.expand_prior(prior).square().mean() > 0.1
    assert beside[..., others:].abs().max() < 0.05 * joint.expand_prior(prior).abs().max()


def test_who_does_not_know_the_ids_knows_the_same_covariance():
    whole = joint_of("llama")
    few = len(whole.axes) // 2
    joint = replace(whole, axes=whole.axes[:few], variance=whole.variance[:few])
    along, axes = joint.prior_out.float(), joint.axes.float()
    with_ids = along.T * joint.prior_variance @ along + axes.T * joint.variance @ axes
    plain = joint.without_ids
    assert plain.prior_in.shape[1] == 0
    assert plain.coordinates == few
    assert (plain.variance.diff() <= 0).all()
    found = plain.axes.float().T * plain.variance @ plain.axes.float()
    left = torch.linalg.eigvalsh(with_ids).flip(0)[few:].square().sum().sqrt()  # no others of this number leave less
    assert (found - with_ids).norm() < left + 0.02 * with_ids.norm()
    torch.testing.assert_close(
        found.diagonal() + plain.rest,
        with_ids.diagonal() + joint.rest,
        rtol=0.02,
        atol=0.01 * float(with_ids.diagonal().mean()),
    )


def test_axes_of_those_without_ids_do_not_hang_on_the_signs_of_a_library(monkeypatch):
    joint, eigh = joint_of("llama"), torch.linalg.eigh
    before = replace(joint).without_ids.axes
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: SimpleNamespace(eigenvectors=-eigh(x).eigenvectors))
    assert torch.equal(replace(joint).without_ids.axes, before)
