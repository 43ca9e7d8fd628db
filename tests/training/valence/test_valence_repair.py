"""Families D and E under the valence objective, with the mercy gate and with the learned quantiser."""

from dataclasses import replace

import pytest
import torch
from small_models import shaken
from test_valence_training import VALENCE, feeling
from tiny_repair import joint_of
from tiny_training import CONFIG, log_lines, parameters

from cachemedic.defenses.defense import CachedTokens
from cachemedic.models.cache import unstack_cache
from cachemedic.studies.family_evaluation import TokenByToken
from cachemedic.training.forward import read_cache, repaired
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.gate import MercyGate
from cachemedic.training.valence.projection import project
from cachemedic.training.valence.quantiser import QuantiserConfig

OPTIONS = {"D": {}, "E": {"share": 1 / 16}}
pytestmark = [
    pytest.mark.usefixtures("_calibrated"),
    pytest.mark.parametrize("family", ["D", "E"]),
    pytest.mark.filterwarnings("ignore:a probe of 12"),
]


def trainer_of(family, base, bank, folder, *objectives, **changes) -> Trainer:
    config = replace(CONFIG, family=family, options=OPTIONS[family], objectives=objectives, lr=2e-2, **changes)
    return Trainer(base, config, folder, bank, feeling, joint_of("gpt2"))


def at_work(trainer: Trainer) -> Trainer:
    """With operators that differ."""
    shaken(trainer.operator, 0.1)
    return trainer


def test_it_sees_the_states_of_a_student_behind_the_repaired_cache(family, base, bank, tmp_path):
    trainer = at_work(trainer_of(family, base, bank, tmp_path, VALENCE, RepairObjective()))
    draw = trainer.draw(2)
    with torch.no_grad():
        seen = trainer.forward(draw).valence
        for run in (0, 3):
            rows, hit = draw.rows[run // 2], (draw.keys[run // 2], draw.values[run // 2])
            ids, valid = bank.ids[rows, : bank.prefix], torch.ones(CONFIG.batch, bank.prefix, dtype=torch.bool)
            repair = TokenByToken(base.model, trainer.operator.select(run))
            kept = repair.write(CachedTokens.behind_padding(bank.keys[rows], bank.values[rows], ids, valid))
            read = repair.read(CachedTokens.behind_padding(*hit, ids, valid), kept)
            output = base.model(
                bank.ids[rows, bank.prefix :],
                past_key_values=unstack_cache(read.k, read.v),
                output_hidden_states=True,
            )
            student = torch.stack(output.hidden_states[1:], 1)
            torch.testing.assert_close(seen.hidden_rep[run], student, rtol=1e-3, atol=1e-3)
            assert not torch.allclose(seen.hidden_clean[run], student, atol=1e-2)


def test_it_trains_with_gate_and_quantiser(family, base, bank, tmp_path):
    options = {"gate": MercyGate(threshold=0.01, every=2, horizon=10, probe=12), "quantiser": QuantiserConfig(2)}
    trainer = trainer_of(family, base, bank, tmp_path, VALENCE, RepairObjective(), **options)
    trainer.best = None  # else a run may end where it began, if no step was better on validation
    parts = trainer.trained.values()
    start = [{name: p.detach().clone() for name, p in part.named_parameters()} for part in parts]
    trainer.run()
    for part, before in zip(parts, start, strict=True):
        for name, p in part.named_parameters():
            assert p.isfinite().all()
            assert (p != before[name]).flatten(1).any(1).all(), name  # of every run
    checks = [line["gate"] for line in log_lines(tmp_path) if "gate" in line]
    assert len(checks) == 3 * 4  # updates 2, 4 and the last


def test_what_the_gate_blocks_is_taken_back(family, base, bank, tmp_path):
    never = MercyGate("proxy", threshold=1.0)
    trainer = trainer_of(family, base, bank, tmp_path, RepairObjective(), gate=never)
    trainer.valence = lambda hidden: feeling(hidden) * 0 + 0.5
    start = parameters(trainer.operator)
    assert all(record["gate"]["blocked"] for record in trainer.train_step())
    torch.testing.assert_close(parameters(trainer.operator), start, rtol=0, atol=0)


def test_what_did_not_pass_the_gate_is_never_the_best(family, base, bank, tmp_path, monkeypatch):
    """The state before training has the lowest loss and fails; the one at the end passes, and is returned."""
    high, low = (torch.full((2,), x) for x in (0.9, 0.1))
    verdicts, losses = [(low, high), (high, high)], [torch.zeros(2), torch.ones(2)]
    monkeypatch.setattr("cachemedic.training.trainer.projection", lambda students, gate, draw: verdicts.pop(0))
    trainer = trainer_of(family, base, bank, tmp_path, RepairObjective(), gate=MercyGate(probe=12))
    monkeypatch.setattr(trainer, "validate", lambda: losses.pop(0))
    start = parameters(trainer.operator)
    end = parameters(trainer.run())
    assert all(not torch.equal(end[name], p) for name, p in start.items())
    assert not verdicts
    assert not losses
    assert trainer.best.loss.tolist() == [1.0, 1.0]


def test_the_gate_projects_behind_the_repaired_cache(family, base, bank, tmp_path):
    gate = MercyGate(horizon=10, probe=12)
    trainer = trainer_of(family, base, bank, tmp_path, RepairObjective(), gate=gate)
    unrepaired, baseline = project(trainer.students, gate)
    repaired, same = project(at_work(trainer).students, gate)
    assert torch.equal(baseline, same)
    assert not torch.allclose(repaired, unrepaired)


@pytest.mark.parametrize("trained", ["steps", "repair", "both"])
def test_steps_and_repair_train_apart_or_together(family, trained, base, bank, tmp_path):
    quantiser = QuantiserConfig(2, trained=trained)
    trainer = trainer_of(family, base, bank, tmp_path, RepairObjective(), quantiser=quantiser, steps=3)
    trainer.best = None  # else a run may end where it began
    start = parameters(trainer.operator)
    trainer.run()
    moved = any(not torch.equal(p, start[name]) for name, p in parameters(trainer.operator).items())
    assert moved == (trained != "steps")
    assert (trainer.quantiser.key_step != 0).any() == (trained != "repair")
    assert (trainer.quantiser.value_offset != 0).any() == (trained != "repair")
    draw = trainer.draw(0)
    found = read_cache(trainer.students, draw)
    assert (repaired(trainer.students, draw, found) is found) == (trained == "steps")


def test_a_run_keeps_steps_and_repair_of_one_moment(family, base, bank, tmp_path):
    trainer = trainer_of(family, base, bank, tmp_path, RepairObjective(), quantiser=QuantiserConfig(2), steps=0)
    trainer.best.update(torch.tensor([1.0, 1.0]))
    before = [p.detach().clone() for part in trainer.trained.values() for p in part.parameters()]
    with torch.no_grad():
        for part in trainer.trained.values():
            for p in part.parameters():
                p += 1
    trainer.best.update(torch.tensor([2.0, 0.5]))  # the second run is better now
    trainer.best.restore()
    after = [p.detach() for part in trainer.trained.values() for p in part.parameters()]
    assert len(after) == len(list(trainer.operator.parameters())) + 4
    for x, y in zip(before, after, strict=True):
        assert torch.equal(y[0], x[0])
        assert torch.equal(y[1], x[1] + 1)


def test_of_a_cache_in_few_bits_only_the_code_is_kept(family, base, bank, tmp_path):
    """Hashes match nowhere: without them every token is repaired, also those that rounding left alone by chance."""
    operator = at_work(trainer_of(family, base, bank, tmp_path, RepairObjective())).operator
    rows = torch.arange(4)
    ids, valid = bank.ids[rows, : bank.prefix], torch.ones(4, bank.prefix, dtype=torch.bool)
    stored = CachedTokens.behind_padding(bank.keys[rows], bank.values[rows], ids, valid)
    lossy, usual = (TokenByToken(base.model, operator, lossy=lossy) for lossy in (True, False))
    assert lossy.bytes_per_token == operator.bytes_per_token
    assert lossy.cache_bytes == 0
    kept = lossy.write(stored)
    if family == "E":
        assert kept.hashes is None
        assert kept.sinks is None
        assert torch.equal(usual.read(stored, usual.write(stored)).k, stored.k)  # nothing is damaged
        assert torch.equal(kept.rows(rows[:2]).codes, kept.codes[:2])
    assert not torch.equal(lossy.read(stored, kept).k, stored.k)
