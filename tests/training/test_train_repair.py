"""Training of families D and E: what students read, what is measured, that it learns and goes on where it stopped."""

import json
from dataclasses import replace

import pytest
import torch
from small_models import shaken
from tiny import DOCUMENTS
from tiny_repair import joint_of
from tiny_training import CONFIG, linear_map, log_lines, parameters, saved, ship, tiny_bank, tiny_base

from cachemedic.core.divergence import contraction_ratio, identity_loss
from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.apply import Mixture
from cachemedic.data import text_source
from cachemedic.defenses.defense import CachedTokens
from cachemedic.studies.family_evaluation import TokenByToken
from cachemedic.training.forward import read_cache, repaired
from cachemedic.training.stored_repair import TINY_DAMAGE, measure_repair
from cachemedic.training.trainer import Trainer

OPTIONS = {"D": {}, "E": {"share": 1 / 16}}
FAMILIES = pytest.mark.parametrize("family", ["D", "E"])


def config_of(family: str, **changes):
    return replace(CONFIG, family=family, **({"options": OPTIONS[family]} | changes))


def trainer_of(base, config, folder, bank) -> Trainer:
    return Trainer(base, config, folder, bank, statistics=joint_of(base.name.removeprefix("tiny-"), config.layers))


@pytest.fixture(autouse=True)
def quick(monkeypatch, _calibrated):
    """A severity map for tiny bases, and little text."""
    monkeypatch.setattr(text_source, "documentation", lambda split: tuple(DOCUMENTS))


def at_work(trainer: Trainer) -> Trainer:
    """With operators that differ."""
    shaken(trainer.operator, 0.1)
    return trainer


@FAMILIES
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(("layers", "corrupted"), [((0, 1, 2), "all"), ((1, 2), "protected")])
def test_students_read_what_a_repair_returns_and_it_is_measured_as_defined(
    family, architecture, layers, corrupted, tmp_path
):
    calibrated = SeverityMap(linear_map(heads=2 if architecture == "llama" else 4))
    base = replace(tiny_base(architecture), severity_map=calibrated)
    config = config_of(family, layers=layers, corrupted_layers=corrupted)
    trainer = at_work(trainer_of(base, config, tmp_path, tiny_bank(base, CONFIG.bank, tmp_path)))
    bank, draw = trainer.bank, trainer.draw(step=2)
    with torch.no_grad():
        found = read_cache(trainer.students, draw)
        read = repaired(trainer.students, draw, found)
        terms = measure_repair(bank, layers, draw, found, read)
        outputs = trainer.forward(draw)
    assert read.keys.shape[:2] == (config.runs, config.batch)
    for run in range(config.runs):
        rows, seed = draw.rows[run // 2], run // 2
        clean = bank.keys[rows], bank.values[rows]
        whole = [x.clone() for x in clean]
        for x, hit in zip(whole, (draw.keys, draw.values), strict=True):
            x[:, trainer.first :] = hit[seed]
        ids, valid = bank.ids[rows, : bank.prefix], torch.ones(config.batch, bank.prefix, dtype=torch.bool)
        defense = TokenByToken(base.model, trainer.operator.select(run))
        kept = defense.write(CachedTokens.behind_padding(*clean, ids, valid))
        alone = defense.read(CachedTokens.behind_padding(*whole, ids, valid), kept)
        torch.testing.assert_close(read.keys[run], alone.k[:, trainer.first :], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(read.values[run], alone.v[:, trainer.first :], rtol=1e-3, atol=1e-3)
        for place, layer in enumerate(layers):
            sound, hit = ([x[:, layer] for x in pair] for pair in (clean, whole))
            mended = [x[run, :, layer - trainer.first] for x in (read.keys, read.values)]
            rho = contraction_ratio(*sound, *hit, *mended)
            damage = sum((h - s).flatten(1).norm(dim=1) for s, h in zip(sound, hit, strict=True))
            much = damage > TINY_DAMAGE * sum(s.flatten(1).norm(dim=1) for s in sound)
            assert torch.equal(terms["found"][run, :, place] > 0, damage > 0)
            torch.testing.assert_close(terms["rho"][run, much, place], rho[much])
            torch.testing.assert_close(terms["identity"][run, :, place], identity_loss(*sound, *mended))
            torch.testing.assert_close(outputs.rho[run, much, place], rho[much], rtol=1e-3, atol=1e-4)
            for side, own, before, after in zip("kv", sound, hit, mended, strict=True):
                left, size = ((x - own).flatten(1).norm(dim=1) for x in (after, before))
                torch.testing.assert_close(terms[f"rho_{side}"][run, much, place], (left / size)[much])


def test_rho_of_hardly_any_damage_is_bounded(base, bank, tmp_path):
    mixture = Mixture({"gaussian": 1.0}, clean_share=0.0, severities=(1.0,))
    trainer = at_work(trainer_of(base, config_of("D", mixture=mixture), tmp_path, bank))
    draw = trainer.draw(0)
    clean = bank.keys[draw.rows], bank.values[draw.rows]
    draw.keys, draw.values = (x + 1e-6 * (y - x) for x, y in zip(clean, (draw.keys, draw.values), strict=True))
    with torch.no_grad():
        terms = trainer.forward(draw)
    assert (terms.rho <= 2 / TINY_DAMAGE).all()


@FAMILIES
def test_training_moves_every_parameter_and_nothing_of_the_base(family, base, bank, tmp_path):
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    trainer = trainer_of(base, config_of(family, lr=2e-2), tmp_path, bank)
    start = parameters(trainer.operator)
    for _ in range(CONFIG.steps):
        trainer.train_step()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in base.model.named_parameters())
    for name, p in trainer.operator.named_parameters():
        assert p.isfinite().all()
        assert (p != start[name]).flatten(1).any(1).all(), name


@FAMILIES
def test_validation_decides_what_is_kept(family, base, bank, tmp_path):
    untrained = trainer_of(base, config_of(family, steps=0), tmp_path / "none", bank)
    fitted = parameters(untrained.operator)
    torch.testing.assert_close(parameters(untrained.run()), fitted, rtol=0, atol=0)
    for name, rate in ("calm", {"lr": 1e-2, "steps": 10}), ("wild", {"lr": 50.0, "clip": 100.0}):
        trainer = trainer_of(base, config_of(family, **rate), tmp_path / name, bank)
        before = trainer.validate()
        trainer.run()
        assert (trainer.validate() <= before).all()


def test_validation_draws_by_the_severities_of_the_base(base, bank, tmp_path, monkeypatch):
    own = replace(base, severity_map=SeverityMap(linear_map()))
    ship(linear_map("another", layers=5), monkeypatch, tmp_path)
    trainer = trainer_of(own, config_of("D"), tmp_path, bank)
    assert trainer.validate().isfinite().all()


def test_a_resumed_run_ends_in_the_same_bytes(base, bank, tmp_path, monkeypatch):
    config = config_of("E")
    trainer_of(base, config, tmp_path / "whole", bank).run()
    broken = trainer_of(base, config, tmp_path / "broken", bank)
    step = broken.optimizer.step

    def interrupted():
        step()
        if broken.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(broken.optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    trainer_of(base, config, tmp_path / "broken", bank).run()
    folders = tmp_path / "whole", tmp_path / "broken"
    first, second = (saved(folder) for folder in folders)
    assert first["step"] == second["step"] == config.steps
    for part in ("operator", "optimizer", "best"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    lines = [
        [json.dumps(line | {"timestamp_utc": "", "checksum": ""}) for line in log_lines(folder)] for folder in folders
    ]
    assert lines[0] == lines[1]
