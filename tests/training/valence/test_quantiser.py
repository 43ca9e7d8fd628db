"""The learned-step-size quantiser: KIVI untrained, the gradients of LSQ, stacks of runs, files."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_training import CONFIG, log_lines

from cachemedic.corruption.apply import Mixture, corrupt
from cachemedic.corruption.spec import CorruptionSpec, draw_event
from cachemedic.corruption.storage_faults import KIVI_GROUPS
from cachemedic.defenses.defense import CachedTokens
from cachemedic.defenses.shadows import GroupQuantisedShadow
from cachemedic.models.shape import ModelShape
from cachemedic.training.forward import read_cache
from cachemedic.training.kept_operators import load_or_train
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.quantiser import BITS, KVQuantiser, QuantiserConfig

SHAPE = (3, 2, 2, 5, 8)  # B, L, G, T, d
MODEL = ModelShape(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, model_type="gpt2")


def cache(seed: int = 0, length: int = SHAPE[3]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn((*SHAPE[:3], length, SHAPE[4]), generator=generator) * 2 + 0.5 for _ in range(2))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", [32, 45])  # a group at the end may be short
def test_untrained_it_is_kivi_bit_for_bit(bits, length):
    keys, values = cache(length=length)
    shadow = GroupQuantisedShadow(MODEL, bits)
    ids, valid = torch.zeros(3, length, dtype=torch.long), torch.ones(3, length, dtype=torch.bool)
    expected = shadow.copy(CachedTokens.behind_padding(keys, values, ids, valid))
    quantiser = KVQuantiser.calibrated(QuantiserConfig(bits), *cache(), runs=2)
    for side, plain in zip(quantiser(keys[None], values[None]), expected, strict=True):
        assert side.shape == (2, *SHAPE[:3], length, 8)
        assert torch.equal(side[1], plain)
    assert quantiser.bits_per_token() == shadow.copy_bits()


@pytest.mark.parametrize("group", KIVI_GROUPS)
def test_untrained_it_is_what_the_fault_of_that_name_does(group):
    """That one keeps ranges unrounded, and groups values within a head."""
    keys, values = cache(length=160)
    name = "kivi_quant" if group == 32 else f"kivi_quant_{group}"
    event = draw_event(CorruptionSpec(name, parameter=3), (2, 2, 160), torch.Generator())
    expected, _ = corrupt(keys, values, [event] * 3, torch.Generator())
    k, _ = KVQuantiser.calibrated(QuantiserConfig(3, group), *cache())(keys[None], values[None])
    near = (k[0] - expected).abs() < 0.05 * (keys.amax() - keys.amin())  # the other side of a border, rarely
    assert near.float().mean() > 0.98


def test_a_narrower_step_and_an_offset_move_the_levels():
    """The slow way, one group: levels about the middle, 0.7 times as wide, moved by a tenth of half the range."""
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(2), *cache())
    with torch.no_grad():
        for name, p in quantiser.named_parameters():
            p.fill_(math.log(0.7) if "step" in name else 0.1)
    k, v = quantiser(keys[None], values[None])

    def slow(x):
        half, middle = (x.max() - x.min()) / 2, (x.max() + x.min()) / 2
        levels = middle + half * (0.1 + 0.7 * torch.tensor([-1, -1 / 3, 1 / 3, 1]))
        return levels[(x[:, None] - levels).abs().argmin(1)]

    pairs = (k[0, 1, 0, 1, :, 3], keys[1, 0, 1, :, 3]), (v[0, 1, 0, :, 4].flatten(), values[1, 0, :, 4].flatten())
    for read, stored in pairs:
        near = (read - slow(stored)).abs() < 0.03  # ranges are kept in bf16: the other side of a border, rarely
        assert near.float().mean() > 0.9


def test_gradients_of_step_and_offset_are_those_of_lsq():
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(2), *cache())
    with torch.no_grad():
        quantiser.key_step.fill_(-0.7)  # steps so small that some keys are clipped
    upstream = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))
    k, _ = quantiser(keys[None], values[None])
    (k * upstream).sum().backward()
    low, high = keys.amin(3, keepdim=True), keys.amax(3, keepdim=True)
    half, width = (high - low) / 2, math.exp(-0.7)
    zero = (low + half * (1 - width)).bfloat16().float()
    step = ((high + half * (width - 1) - zero) / 3).bfloat16().float()
    place = (keys - zero) / step
    inside = (place > 0) & (place < 3)
    by_step = torch.where(inside, place.round() - place, place.clamp(0, 3))  # d k / d step (equation 3 of LSQ)
    by_zero = (~inside).float()
    by_log = by_step * 2 * half * width / 3 - by_zero * half * width
    expected = (upstream[0] * by_log).sum((0, 3))
    torch.testing.assert_close(quantiser.key_step.grad[0], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        quantiser.key_offset.grad[0], (upstream[0] * by_zero * half).sum((0, 3)), rtol=1e-3, atol=1e-3
    )
    assert (~inside).any()


def test_runs_are_apart_and_select_takes_one_out():
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(3, 4), *cache(), runs=4)
    with torch.no_grad():
        for p in quantiser.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    two_seeds = torch.stack([keys, keys + 1]), torch.stack([values, values - 1])
    k, v = quantiser(*two_seeds)
    for run in range(4):
        alone = quantiser.select(run)(*(x[run // 2 : run // 2 + 1] for x in two_seeds))
        assert torch.equal(k[run], alone[0][0])
        assert torch.equal(v[run], alone[1][0])
    second, _ = quantiser.condition(1, conditions=2)(*two_seeds)
    assert torch.equal(second, k[1::2])


@pytest.mark.parametrize(("bits", "group", "expected"), [(4, 16, 2 * 32 * 4 + 4 * 32), (2, 4, 2 * 32 * 2 + 16 * 32)])
def test_stored_bits_count_zeros_and_scales(bits, group, expected):
    """32 keys and 32 values a token, two layers of 16: a share of a group of tokens each, and groups of channels."""
    assert KVQuantiser.calibrated(QuantiserConfig(bits, group), *cache()).bits_per_token() == expected


def test_files(tmp_path):
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(3, 4), *cache(), runs=2)
    quantiser.key_step.data.normal_(generator=torch.Generator().manual_seed(2))
    quantiser.save_pretrained(tmp_path)
    for _ in range(20):
        assert list(KVQuantiser.from_pretrained(tmp_path).state_dict()) == list(quantiser.state_dict())
    again = KVQuantiser.from_pretrained(tmp_path)
    assert again.config == quantiser.config
    pairs = zip(again(keys[None], values[None]), quantiser(keys[None], values[None]), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    (tmp_path / "quantiser.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged or not of this quantiser.json"):
        KVQuantiser.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no quantiser"):
        KVQuantiser.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "one of 4, 3, 2, not 5"),
        ({"bits": 2, "group": 0}, "group must be 1 or more, not 0"),
        ({"bits": 2, "trained": "step"}, "steps"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantiserConfig(**options)


ROUNDING = replace(
    CONFIG, mixture=Mixture(clean_share=1.0), objectives=(RepairObjective(),), quantiser=QuantiserConfig(2), lr=3e-2
)


@pytest.mark.usefixtures("_calibrated")
def test_steps_are_learned_together_with_the_repair(base, bank, tmp_path):
    trainer = Trainer(base, replace(ROUNDING, steps=30), tmp_path, bank)
    trainer.run()
    losses = [line["loss_kd"] for line in log_lines(tmp_path)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert (trainer.quantiser.key_step != 0).any()
    assert (trainer.operator.u_k != 0).any()
    outputs = trainer.forward(trainer.draw(0))
    assert not outputs.is_clean.any()  # a cache of two bits is never what the teacher stored
    assert outputs.is_corrupted.all()


@pytest.mark.usefixtures("_calibrated")
def test_alone_the_operator_stays_the_identity(base, bank, tmp_path):
    trainer = Trainer(base, replace(ROUNDING, quantiser=QuantiserConfig(2, trained="steps")), tmp_path, bank)
    for _ in range(3):
        trainer.train_step()
    assert (trainer.operator.u_k == 0).all()
    assert (trainer.quantiser.value_step != 0).any()


@pytest.mark.usefixtures("_calibrated")
def test_a_fault_replaces_what_it_hits_and_the_rest_is_rounded(base, bank, tmp_path):
    mixture = Mixture({"contiguous_overwrite": 1.0}, clean_share=0.0, severities=(0.02,))
    trainer = Trainer(base, replace(ROUNDING, mixture=mixture), tmp_path, bank)
    drawn = trainer.draw(1)
    read = read_cache(trainer.students, drawn)
    hit = drawn.keys != bank.keys[drawn.rows]
    stored, _ = trainer.quantiser(bank.keys[drawn.rows], bank.values[drawn.rows])
    assert hit.any()
    assert not hit.all()
    assert torch.equal(read.keys[hit], drawn.keys[hit])
    assert torch.equal(read.keys[~hit], stored[~hit])


@pytest.mark.usefixtures("_calibrated")
def test_it_is_kept_beside_the_operators(base, bank, tmp_path, monkeypatch):
    monkeypatch.setattr("cachemedic.training.trainer.open_bank", lambda *_: bank)
    config = replace(ROUNDING, steps=2)
    load_or_train(base, config, tmp_path / "trained", tmp_path / "work")
    quantiser = KVQuantiser.from_pretrained(tmp_path / "trained" / config.key(base))
    assert quantiser.runs == config.runs
    assert (quantiser.key_step != 0).any()
    assert config.key(base) != replace(config, quantiser=None).key(base)


def test_a_constant_group_comes_back_with_finite_gradients():
    keys, values = cache()
    keys[..., 0], values[..., 4, :] = 0.75, -300.0
    quantiser = KVQuantiser.calibrated(QuantiserConfig(2), *cache())
    read = quantiser(keys[None], values[None])
    sum(x.square().sum() for x in read).backward()
    assert all(x.isfinite().all() for x in (*read, *(p.grad for p in quantiser.parameters())))
    assert torch.equal(read[0][0, ..., 0], keys[..., 0])
    assert torch.equal(read[1][0, ..., 4, :], values[..., 4, :])
