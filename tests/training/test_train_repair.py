"""Training of families D and E: what students read, what is measured, that it learns and goes on where it stopped."""

import json
from dataclasses import replace

import pytest
import torch
from small_models import shaken
from tiny import DOCUMENTS
from tiny_training import CONFIG, linear_map, log_lines, parameters, saved, tiny_bank, tiny_base

from cachemedic.core.divergence import contraction_ratio, identity_loss
from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.apply import Mixture
from cachemedic.data import text_source
from cachemedic.defenses.defense import CachedTokens
from cachemedic.token.layerwise import calibration
from cachemedic.token.layerwise.scrub import Scrubber, positions_of
from cachemedic.training.forward import read_cache, repaired
from cachemedic.training.objective import RepairObjective
from cachemedic.training.repair_terms import measure_repair
from cachemedic.training.trainer import Trainer

OPTIONS = {"layerwise-D": {"coordinates": 4}, "layerwise-E": {"coordinates": 4, "share": 0.1}}
FAMILIES = pytest.mark.parametrize("family", ["layerwise-D", "layerwise-E"])


def config_of(family: str, **changes):
    return replace(CONFIG, family=family, **({"options": OPTIONS[family]} | changes))


@pytest.fixture(autouse=True)
def quick(monkeypatch, _calibrated):
    """A severity map for tiny bases, and calibration on little text."""
    monkeypatch.setattr(text_source, "documentation", lambda split: tuple(DOCUMENTS))
    few = {"DOCUMENTATION_SAMPLES": 8, "REVIEW_SAMPLES": 4, "REVIEWS": 60, "FISHER_SAMPLES": 2}
    for name, value in (few | {"CALIBRATION_LENGTH": 40, "FISHER_PREFIX": 20, "FISHER_DECODED": 4}).items():
        monkeypatch.setattr(calibration, name, value)


def at_work(trainer: Trainer) -> Trainer:
    """With operators that differ and are no identity."""
    shaken(trainer.operator, 0.1)
    trainer.operator.strength.data.copy_(torch.linspace(0.4, 1.0, trainer.operator.runs)[:, None] / 32)
    return trainer


@FAMILIES
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(("layers", "corrupted"), [((0, 1, 2), "all"), ((1, 2), "protected")])
def test_students_read_what_a_scrub_returns_and_it_is_measured_as_defined(
    family, architecture, layers, corrupted, tmp_path
):
    calibrated = SeverityMap(linear_map(heads=2 if architecture == "llama" else 4))
    base = replace(tiny_base(architecture), severity_map=calibrated)
    options = OPTIONS[family] | {"known_layers": 2}
    config = config_of(family, layers=layers, corrupted_layers=corrupted, options=options)
    trainer = at_work(Trainer(base, config, tmp_path, tiny_bank(base, CONFIG.bank, tmp_path)))
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
        scrubber = Scrubber(base.model, trainer.operator.select(run))
        codes = scrubber.write(CachedTokens.behind_padding(*clean, ids, valid))
        k, v, _ = scrubber.scrub(*whole, ids, positions_of(valid), codes)
        torch.testing.assert_close(read.keys[run], k[:, trainer.first :].detach(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(read.values[run], v[:, trainer.first :].detach(), rtol=1e-3, atol=1e-3)
        for place, layer in enumerate(layers):
            sound, hit = ([x[:, layer] for x in pair] for pair in (clean, whole))
            mended = [x[run, :, layer - trainer.first] for x in (read.keys, read.values)]
            rho = contraction_ratio(*sound, *hit, *mended)
            is_hit = (hit[0] != sound[0]).flatten(1).any(1)
            assert torch.equal(terms["found"][run, :, place] > 0, is_hit)
            torch.testing.assert_close(terms["rho"][run, is_hit, place], rho[is_hit])
            torch.testing.assert_close(terms["identity"][run, :, place], identity_loss(*sound, *mended))
            torch.testing.assert_close(outputs.rho[run, is_hit, place], rho[is_hit], rtol=1e-3, atol=1e-4)
            for side, own, before, after in zip("kv", sound, hit, mended, strict=True):
                left, size = ((x - own).flatten(1).norm(dim=1) for x in (after, before))
                torch.testing.assert_close(terms[f"rho_{side}"][run, is_hit, place], (left / size)[is_hit])


@FAMILIES
def test_a_new_operator_is_read_as_none_and_its_first_gradient_turns_it_on(family, base, bank, tmp_path):
    mixture = Mixture({"gaussian": 1.0}, clean_share=0.0, severities=(1.0,))
    trainer = Trainer(base, config_of(family, mixture=mixture), tmp_path, bank)
    draw = trainer.draw(0)
    found = read_cache(trainer.students, draw)
    read = repaired(trainer.students, draw, found)
    for run in range(4):
        assert torch.equal(read.keys[run], found.keys[run // 2])
        assert torch.equal(read.values[run], found.values[run // 2])
    trainer.objective(trainer.forward(draw))["loss"].sum().backward()
    assert (trainer.operator.strength.grad < 0).all()
    assert trainer.operator.strength.grad.isfinite().all()


@FAMILIES
def test_training_moves_every_parameter_and_nothing_of_the_base(family, base, bank, tmp_path):
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    trainer = Trainer(base, config_of(family, lr=2e-2), tmp_path, bank)
    start = parameters(trainer.operator)
    trainer.run()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in base.model.named_parameters())
    for name, p in trainer.operator.named_parameters():
        assert p.isfinite().all()
        assert (p != start[name]).flatten(1).any(1).all(), name


@FAMILIES
def test_training_repairs(family, base, bank, tmp_path):
    mixture = Mixture({"gaussian": 0.5, "dropout_zero": 0.5}, clean_share=0.0, severities=(0.5, 1.0))
    once = (RepairObjective(lambda_contr=0.0),)
    trainer = Trainer(base, config_of(family, objectives=once, mixture=mixture, steps=24, lr=1e-2), tmp_path, bank)
    trainer.run()
    losses = [record["loss_kd"] for record in log_lines(tmp_path)]
    untrained = sum(losses[:2]) / 2
    assert sum(losses[-8:]) / 8 < (0.7 if family == "layerwise-E" else 0.9) * untrained


def test_runs_in_one_loop_are_the_runs_trained_alone(base, bank, tmp_path):
    together = Trainer(base, config_of("layerwise-E", lr=2e-2, steps=3), tmp_path / "all", bank).run()
    half = type(bank)(**{name: x[12:] for name, x in vars(bank).items()})
    config = config_of("layerwise-E", lr=2e-2, steps=3, seeds=CONFIG.seeds[1:], objectives=CONFIG.objectives[1:])
    alone = Trainer(base, config, tmp_path / "alone", half).run()
    torch.testing.assert_close(parameters(together.select(3)), parameters(alone), rtol=1e-3, atol=1e-4)


@FAMILIES
def test_a_resumed_run_ends_in_the_same_bytes(family, base, bank, tmp_path, monkeypatch):
    config = config_of(family)
    Trainer(base, config, tmp_path / "whole", bank).run()
    broken = Trainer(base, config, tmp_path / "broken", bank)
    step = broken.optimizer.step

    def interrupted():
        step()
        if broken.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(broken.optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    Trainer(base, config, tmp_path / "broken", bank).run()
    folders = tmp_path / "whole", tmp_path / "broken"
    first, second = (saved(folder) for folder in folders)
    assert first["step"] == second["step"] == config.steps
    for part in ("operator", "optimizer"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    lines = [[json.dumps(line | {"timestamp_utc": ""}) for line in log_lines(folder)] for folder in folders]
    assert lines[0] == lines[1]
