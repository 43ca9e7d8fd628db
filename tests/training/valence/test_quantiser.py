"""The learned-step-size quantiser: rounding to nearest untrained, the gradients of LSQ, stacks of runs, files."""

from dataclasses import replace

import pytest
import torch
from tiny_training import CONFIG, log_lines

from cachemedic.corruption.apply import Mixture
from cachemedic.training.forward import read_cache
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer, load_or_train
from cachemedic.training.valence.quantiser import KVQuantiser, QuantiserConfig

SHAPE = (3, 2, 2, 5, 8)  # B, L, G, T, d


def cache(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(SHAPE, generator=generator) * 2 + 0.5 for _ in range(2))


def nearest(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """The slow way: of all levels from `low` to `high` the nearest."""
    levels = low[..., None] + (high - low)[..., None] * torch.arange(2**bits) / (2**bits - 1)
    return levels.expand(*x.shape, -1).gather(-1, (x[..., None] - levels).abs().argmin(-1, keepdim=True)).squeeze(-1)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("group", [None, 4, 2])
def test_untrained_it_rounds_to_nearest(bits, group):
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(bits, group), keys, values, runs=2)
    k, v = quantiser(keys[None], values[None])
    assert k.shape == v.shape == (2, *SHAPE)
    low, high = keys.amin((0, 3), keepdim=True), keys.amax((0, 3), keepdim=True)
    torch.testing.assert_close(k[1], nearest(keys, low, high, bits), rtol=1e-5, atol=1e-5)
    grouped = values.unflatten(-1, (-1, group or 8))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    torch.testing.assert_close(
        v[1], nearest(grouped, low, high, bits).flatten(-2), rtol=5e-3, atol=5e-3
    )  # 16-bit scales


def test_new_keys_beyond_the_range_are_clipped():
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(3), keys, values)
    k, _ = quantiser(keys[None] * 10, values[None])
    assert (k[0].amax((0, 3)) <= keys.amax((0, 3)) + 1e-5).all()


def test_the_gradient_of_a_step_is_that_of_lsq():
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(2), keys, values)
    with torch.no_grad():
        quantiser.log_key.fill_(-0.7)  # steps so small that some keys are clipped
    upstream = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))
    k, _ = quantiser(keys[None], values[None])
    (k * upstream).sum().backward()
    step = (quantiser.key_step * torch.exp(torch.tensor(-0.7)))[:, :, None]
    u = (keys - quantiser.key_middle[:, :, None]) / step
    nearest_level = ((u - 0.5).round() + 0.5).clamp(-1.5, 1.5)
    by_step = torch.where(u.abs() < 2, nearest_level - u, 1.5 * u.sign())  # d k / d step (equation 3 of LSQ)
    scale = (SHAPE[0] * SHAPE[3] * 2) ** -0.5  # N numbers share it, 2 levels a side
    expected = (upstream[0] * by_step * step).sum((0, 3)) * scale  # the parameter is the logarithm of the step
    torch.testing.assert_close(quantiser.log_key.grad[0], expected, rtol=1e-4, atol=1e-5)
    assert (u.abs() > 2).any()


def test_rounding_passes_the_gradient_on_within_the_range():
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(2), keys, values)
    keys.requires_grad_()
    quantiser((keys * 2)[None], values[None])[0].sum().backward()
    u = (keys.detach() * 2 - quantiser.key_middle[:, :, None]) / quantiser.key_step[:, :, None]
    assert torch.equal(keys.grad, torch.where(u.abs() < 2, 2.0, 0.0))


def test_runs_are_apart_and_select_takes_one_out():
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(3, 4), keys, values, runs=4)
    with torch.no_grad():
        for p in quantiser.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    two_seeds = torch.stack([keys, keys + 1]), torch.stack([values, values - 1])
    k, v = quantiser(*two_seeds)
    for run in range(4):
        alone = quantiser.select(run)(*(x[run // 2 : run // 2 + 1] for x in two_seeds))
        torch.testing.assert_close((k[run], v[run]), (alone[0][0], alone[1][0]))


@pytest.mark.parametrize(("bits", "group", "expected"), [(4, None, 64 * 4 + 4 * 32), (2, 4, 64 * 2 + 8 * 32)])
def test_stored_bits_count_the_scales(bits, group, expected):
    keys, values = cache()
    assert KVQuantiser.calibrated(QuantiserConfig(bits, group), keys, values).bits_per_token() == expected


def test_files(tmp_path):
    keys, values = cache()
    quantiser = KVQuantiser.calibrated(QuantiserConfig(3, 4), keys, values, runs=2)
    quantiser.log_key.data.normal_(generator=torch.Generator().manual_seed(2))
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
    ("options", "message"), [({"bits": 5}, "one of 4, 3, 2, not 5"), ({"bits": 2, "group": 0}, "group")]
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantiserConfig(**options)
    with pytest.raises(ValueError, match="group of 3 channels does not divide the head size, 8"):
        KVQuantiser.calibrated(QuantiserConfig(2, 3), *cache())


ROUNDING = replace(
    CONFIG, mixture=Mixture(clean_share=1.0), objectives=(RepairObjective(),), quantiser=QuantiserConfig(2), lr=3e-2
)


@pytest.mark.usefixtures("_calibrated")
def test_steps_are_learned_together_with_the_repair(base, bank, tmp_path):
    trainer = Trainer(base, replace(ROUNDING, steps=30), tmp_path, bank)
    trainer.run()
    losses = [line["loss_kd"] for line in log_lines(tmp_path)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert (trainer.quantiser.log_key != 0).any()
    assert (trainer.operator.u_k != 0).any()
    outputs = trainer.forward(trainer.draw(0))
    assert not outputs.is_clean.any()  # a cache of two bits is never what the teacher stored
    assert outputs.is_corrupted.all()


@pytest.mark.usefixtures("_calibrated")
def test_alone_the_operator_stays_the_identity(base, bank, tmp_path):
    trainer = Trainer(base, replace(ROUNDING, quantiser=QuantiserConfig(2, alone=True)), tmp_path, bank)
    trainer.run()
    assert (trainer.operator.u_k == 0).all()
    assert (trainer.quantiser.log_value != 0).any()


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
    assert (quantiser.log_key != 0).any()
    assert config.key(base) != replace(config, quantiser=None).key(base)


@pytest.mark.parametrize("constant", [0.0, 0.7, -300.0, 1e-42])
def test_a_channel_that_was_constant_in_calibration_has_finite_gradients(constant):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 2, 2, 5, 8, generator=generator)
    calibrated_on = keys.clone()
    calibrated_on[..., 0] = constant
    for scale in (1.0, 0.0):  # the other channels, too
        sound = torch.where(calibrated_on == constant, calibrated_on, calibrated_on * scale)
        quantiser = KVQuantiser.calibrated(QuantiserConfig(2, 4), sound, values)
        read = quantiser(keys[None], values[None])
        sum(x.square().sum() for x in read).backward()
        assert all(x.isfinite().all() for x in (*read, *(p.grad for p in quantiser.parameters())))
        kept, _ = quantiser(sound[None], values[None])
        torch.testing.assert_close(kept[0, ..., 0], sound[..., 0], atol=1e-4, rtol=1e-4)


def test_what_a_quantiser_is_calibrated_on_must_be_finite():
    clean = torch.ones(3, 2, 2, 5, 8)
    for wrong in (torch.nan, torch.inf):
        damaged = clean.clone()
        damaged[0, 0, 0, 0, 0] = wrong
        for keys, values in ((damaged, clean), (clean, damaged)):
            with pytest.raises(ValueError, match="not finite"):
                KVQuantiser.calibrated(QuantiserConfig(4), keys, values)


def test_values_beyond_half_precision_are_refused():
    keys = values = torch.ones(3, 2, 2, 5, 8)
    quantiser = KVQuantiser.calibrated(QuantiserConfig(4), keys, values)
    with pytest.raises(ValueError, match="values of up to 70000 cannot be quantised.*up to 65,504"):
        quantiser(keys[None], 70_000 * values[None])
