"""The training log and checkpoints: complete, resumed to the same bytes, and never those of another training."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from tiny_training import CONFIG, log_lines, parameters, saved

import cachemedic
from cachemedic.core.files import seal
from cachemedic.training import trainer as train
from cachemedic.training.kept_operators import load_or_train
from cachemedic.training.log import drop_after, ship_log
from cachemedic.training.trainer import Trainer

SCHEMA = json.loads((Path(cachemedic.__file__).parent / "schemas" / "log_record.schema.json").read_text())
pytestmark = pytest.mark.usefixtures("_calibrated")


def test_log_lines_are_valid_and_complete(base, bank, tmp_path):
    Trainer(base, CONFIG, tmp_path, bank).run()
    lines = log_lines(tmp_path)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for line in lines:
        validator.validate(line)
        assert len(line["events"]) == len(line["corruption_type"]) == len(line["corruption_severity"]) == CONFIG.batch
        lambda_contr = 0.5 if line["run_id"].endswith("condition0") else 0.0
        parts = line["loss_kd"] + line["loss_id"] + lambda_contr * line["loss_contr"]
        assert line["loss_total"] == pytest.approx(parts)
    key = CONFIG.key(base)
    runs = [f"{key}/seed{seed}/condition{condition}" for seed in (3, 7) for condition in (0, 1)]
    assert [(line["step"], line["run_id"]) for line in lines] == [(s, run) for s in range(1, 6) for run in runs]


def interrupt(trainer: Trainer, monkeypatch, after: int) -> None:
    """Run, and stop as Ctrl-C would in the middle of a step: parameters have moved, the step is not yet counted."""
    real = trainer.optimizer.step

    def step():
        real()
        if trainer.step == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.optimizer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_resumed_run_ends_in_the_same_bytes(after, base, bank, tmp_path, monkeypatch):
    whole = Trainer(base, CONFIG, tmp_path / "whole", bank)
    whole.run()
    broken = tmp_path / "broken"
    interrupt(Trainer(base, CONFIG, broken, bank), monkeypatch, after)
    with open(broken / "log.jsonl", "a") as log:
        log.write('{"run_id": "torn')
    Trainer(base, CONFIG, broken, bank).run()
    first, second = (saved(f) for f in (tmp_path / "whole", broken))
    assert first["step"] == second["step"] == CONFIG.steps
    for name, value in first["operator"].items():
        assert torch.equal(value, second["operator"][name]), name
    torch.testing.assert_close(first["optimizer"], second["optimizer"], rtol=0, atol=0)
    lines = [
        [json.dumps(line | {"timestamp_utc": "", "checksum": ""}) for line in log_lines(f)]
        for f in (tmp_path / "whole", broken)
    ]
    assert lines[0] == lines[1]


def test_a_finished_run_is_left_as_it_is(base, bank, tmp_path):
    operator = Trainer(base, CONFIG, tmp_path, bank).run()
    log = (tmp_path / "log.jsonl").read_bytes()
    again = Trainer(base, CONFIG, tmp_path, bank).run()
    torch.testing.assert_close(parameters(operator), parameters(again), rtol=0, atol=0)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_a_diverged_run_is_an_error_that_keeps_the_checkpoint(base, bank, tmp_path, monkeypatch):
    trainer = Trainer(base, CONFIG, tmp_path, bank)
    draw = trainer.draw

    def poisoned(step):
        drawn = draw(step)
        drawn.values[1, 0] *= torch.inf if step == 3 else 1
        return drawn

    monkeypatch.setattr(trainer, "draw", poisoned)
    with pytest.raises(FloatingPointError, match=r"runs \[2, 3\] is not finite at step 4"):
        trainer.run()
    state = saved(tmp_path)
    assert state["step"] == 2
    assert all(p.isfinite().all() for p in state["operator"].values())


def test_a_checkpoint_of_another_training_is_refused(base, bank, tmp_path):
    Trainer(base, replace(CONFIG, steps=1), tmp_path, bank).run()
    with pytest.raises(ValueError, match="belongs to tiny-gpt2-A-.*, not to tiny-gpt2-B-"):
        Trainer(base, replace(CONFIG, family="B", steps=1), tmp_path, bank).run()


def test_a_damaged_checkpoint_is_refused(base, bank, tmp_path):
    Trainer(base, replace(CONFIG, steps=1), tmp_path, bank).run()
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"checkpoint.safetensors is damaged.*; delete it"):
        Trainer(base, replace(CONFIG, steps=1), tmp_path, bank).run()


def test_operators_are_trained_once_unless_asked(base, bank, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_bank", lambda base, config: bank)
    steps = []
    real = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: steps.append(self.step) or real(self))

    def operators(**options):
        return parameters(load_or_train(base, CONFIG, tmp_path / "trained", tmp_path / "work", **options))

    first = operators()
    assert steps == [0, 1, 2, 3, 4]
    torch.testing.assert_close(operators(), first, rtol=0, atol=0)
    assert len(steps) == 5
    torch.testing.assert_close(operators(retrain=True), first, rtol=0, atol=0)
    assert len(steps) == 10
    assert len(log_lines(tmp_path / "work" / CONFIG.key(base))) == 20


def test_two_that_ask_at_once_train_once(base, bank, tmp_path, monkeypatch):
    monkeypatch.setattr("cachemedic.training.trainer.open_bank", lambda *_: bank)
    steps, real = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: steps.append(self.step) or real(self))
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(load_or_train, base, CONFIG, tmp_path / "trained", tmp_path / "work") for _ in range(2)]
        first, second = (parameters(job.result()) for job in jobs)
    assert steps == [0, 1, 2, 3, 4]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": "x", "run_id": "a"}', "\x00"])
def test_a_damaged_line_of_the_log_is_named(line, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(seal({"step": 1, "run_id": "a"}, indent=None) + f"{line}\n".encode())
    with pytest.raises(ValueError, match=r"line 2 of .*log.jsonl is damaged"):
        drop_after(log, 2, runs=1)
    with pytest.raises(ValueError, match=r"line 2 of .*log.jsonl is damaged"):
        ship_log(log, tmp_path)
