"""The mercy gate in the trainer: what it projects, what it takes back, and what it leaves as it is."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from tiny_training import CONFIG, log_lines, parameters
from tiny_valence import feeling, trainer_of

import cachemedic
from cachemedic.models.cache import unstack_cache
from cachemedic.training.draws import draw_step
from cachemedic.training.kept_operators import load_or_train
from cachemedic.training.log import gate_checks, ship_log
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.gate import MercyGate, MercyGateError
from cachemedic.training.valence.objective import ValenceObjective
from cachemedic.training.valence.projection import PROBE_STEP, project, proxy

SCHEMAS = Path(cachemedic.__file__).parent / "schemas"
SCHEMA, GATE_SCHEMA = (json.loads((SCHEMAS / f"{name}_record.schema.json").read_text()) for name in ("log", "gate"))
VALENCE = ValenceObjective(sampled=3)
pytestmark = [pytest.mark.usefixtures("_calibrated"), pytest.mark.filterwarnings("ignore:a probe of 12")]


@pytest.mark.parametrize("greedy", [True, False])
def test_the_projection_is_the_valence_of_what_the_student_goes_on_to_say(greedy, base, bank, tmp_path):
    gate = MercyGate(horizon=10, probe=12, greedy=greedy)
    trainer = trainer_of(base, bank, tmp_path, RepairObjective(), gate=gate)
    projected, baseline = project(trainer.students, gate)
    assert torch.equal(projected, project(trainer.students, gate)[0])  # the probe is always the same
    if not greedy:
        return
    rows = draw_step(replace(trainer.config, batch=gate.probe), bank, 0, PROBE_STEP).rows
    for seed in range(2):
        cache = unstack_cache(bank.keys[rows[seed]], bank.values[rows[seed]])
        token, states = bank.ids[rows[seed], bank.prefix][:, None], []
        for _ in range(10):
            output = base.model(token, past_key_values=cache, output_hidden_states=True)
            token = output.logits[:, -1:].argmax(-1)
            states.append(output.hidden_states[-1][:, -1])
        assert float(baseline[seed]) == pytest.approx(float(feeling(torch.stack(states))[..., 0].mean()), abs=1e-4)
    assert not torch.allclose(projected, baseline)


def test_a_gate_that_blocks_leaves_every_run_as_it_was_and_ends_in_an_error(base, bank, tmp_path):
    never = MercyGate("proxy", threshold=1.0, patience=3)
    low = lambda hidden: feeling(hidden) * 0 + 0.5  # noqa: E731  the student's 0.95 * 0.5 is below the teacher's 0.5
    trainer = Trainer(base, replace(CONFIG, gate=never), tmp_path, bank, low)
    start = parameters(trainer.operator)
    records = [trainer.train_step() for _ in range(2)]
    assert all(r["gate"]["blocked"] and "Mercy gate blocked" in r["gate"]["message"] for r in records[0])
    torch.testing.assert_close(parameters(trainer.operator), start, rtol=0, atol=0)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for record in records[0]:
        validator.validate(record)
    trainer.save()
    again = Trainer(base, replace(CONFIG, gate=never), tmp_path, bank, low)
    again.resume()
    assert again.keeper.blocked.tolist() == [2] * 4
    with pytest.raises(MercyGateError, match="3 checks in a row"):
        again.train_step()


def test_a_gate_that_passes_changes_nothing(base, bank, tmp_path, monkeypatch):
    free, gated = (
        trainer_of(base, bank, tmp_path / name, VALENCE, gate=gate)
        for name, gate in (("free", None), ("gated", MercyGate(threshold=0.01, every=2, horizon=10, probe=12)))
    )
    torch.testing.assert_close(parameters(free.run()), parameters(gated.run()), rtol=0, atol=0)
    checks = [line["gate"] for line in log_lines(tmp_path / "gated") if "gate" in line]
    assert len(checks) == 2 * 3  # updates 2, 4 and the last
    assert not any(check["blocked"] for check in checks)
    monkeypatch.setattr("cachemedic.training.trainer.open_bank", lambda *_: bank)
    monkeypatch.setattr("cachemedic.training.trainer.shipped_valence", lambda *_: feeling)
    load_or_train(base, gated.config, tmp_path / "trained", tmp_path / "work")
    shipped = tmp_path / "trained" / gated.key
    assert [check["projected"] for check in gate_checks(shipped)] == [check["projected"] for check in checks]
    kept = (shipped / "gate.jsonl").read_text()
    for line in kept.splitlines():
        jsonschema.Draft202012Validator(GATE_SCHEMA).validate(json.loads(line))
    (shipped / "gate.jsonl").write_text(kept.replace("false", "true", 1))
    with pytest.raises(ValueError, match=r"line 1 of .*gate.jsonl is damaged: it is not as it was saved"):
        gate_checks(shipped)
    log = tmp_path / "work" / gated.key / "log.jsonl"
    assert gzip.decompress((shipped / "log.jsonl.gz").read_bytes()) == log.read_bytes()
    first = (shipped / "log.jsonl.gz").read_bytes()
    ship_log(log, shipped)
    assert (shipped / "log.jsonl.gz").read_bytes() == first


def test_the_state_that_training_returns_has_passed(base, bank, tmp_path, monkeypatch):
    """Updates 4 and 6, the last, are checked; only the fourth passes, so its state is what training returns."""
    monkeypatch.setattr("cachemedic.training.trainer.projection", lambda students, gate, draw: verdicts.pop(0))
    high, low = (torch.full((2,), x) for x in (0.9, 0.1))
    verdicts = [(high, high), (high, high), (low, high)]  # before training, update 4, update 6
    gated = trainer_of(base, bank, tmp_path / "a", RepairObjective(), gate=MercyGate(every=4, probe=12), steps=6)
    gated.run()
    assert not verdicts
    free = trainer_of(base, bank, tmp_path / "b", RepairObjective(), steps=6)
    for _ in range(4):
        free.train_step()
    torch.testing.assert_close(parameters(gated.operator), parameters(free.operator), rtol=0, atol=0)
    checks = [(line["step"], line["gate"]["blocked"]) for line in log_lines(tmp_path / "a") if "gate" in line]
    assert checks == [(4, False)] * 2 + [(6, True)] * 2
    verdicts = [(low, high), (low, high), (low, high)]
    with pytest.raises(MercyGateError, match=r"no state of runs \[0, 1\] passed"):
        trainer_of(base, bank, tmp_path / "c", RepairObjective(), gate=MercyGate(every=4, probe=12), steps=6).run()


def test_the_proxy_sees_the_update(base, bank, tmp_path):
    gate = MercyGate("proxy", threshold=0, both=True, probe=12)
    trainer = trainer_of(base, bank, tmp_path, RepairObjective(), gate=gate)
    drawn = trainer.draw(0)
    before, teacher = proxy(trainer.students, drawn)
    trainer.train_step()
    (after, same), outputs = proxy(trainer.students, drawn), trainer.forward(drawn)
    assert not torch.allclose(before, after)
    assert torch.equal(teacher, same)
    assert outputs.valence is None
    seen = trainer_of(base, bank, tmp_path, VALENCE)
    seen.operator.load_state_dict(trainer.operator.state_dict())
    futures = seen.forward(drawn).valence
    torch.testing.assert_close(after, 0.95 * futures.future_rep[..., 0].mean((1, 2)))
    torch.testing.assert_close(teacher, futures.future_clean[..., 0].mean((1, 2)))
