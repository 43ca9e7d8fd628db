"""Families D and E under the valence objective, with the mercy gate and with the learned quantiser."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from small_models import shaken
from test_valence_training import VALENCE, feeling
from tiny import DOCUMENTS, tiny_tokenizer
from tiny_repair import joint_of
from tiny_training import CONFIG, log_lines, parameters

from cachemedic.data.task_data import score
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.defense import CachedTokens
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.models.cache import unstack_cache
from cachemedic.studies.quantised_evaluation import quantised_scores
from cachemedic.token.token_repair import TokenRepair
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.gate import MercyGate
from cachemedic.training.valence.projection import project
from cachemedic.training.valence.quantiser import KVQuantiser, QuantiserConfig

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
            repair = TokenRepair(base.model, trainer.operator.select(run))
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


def test_a_quantised_cache_is_repaired_and_its_code_counted(family, base, bank, tmp_path):
    trainer = at_work(trainer_of(family, base, bank, tmp_path, RepairObjective()))
    task = perplexity_task(tiny_tokenizer(), DOCUMENTS, CONFIG.seeds, n=2, prefix=10, scored=3)
    clean = clean_pass(base.model, task)
    quantiser = KVQuantiser.calibrated(QuantiserConfig(2), clean.k, clean.v)
    readers = {"steps": (quantiser, None), "steps + repair": (quantiser, trainer.operator)}
    rows = quantised_scores(base, task, clean, readers).set_index(["reader", "seed"])
    repair = TokenRepair(base.model, trainer.operator)
    kept = repair.write(CachedTokens.behind_padding(clean.k, clean.v, task.prefix_ids, task.prefix_mask))
    k, v = (x.flatten(0, 1) for x in quantiser(clean.k[None], clean.v[None]))
    read = repair.read(CachedTokens.behind_padding(k, v, task.prefix_ids, task.prefix_mask), kept)
    assert not torch.equal(read.k, k)
    with torch.no_grad():
        output = base.model(task.continuation_ids, past_key_values=unstack_cache(read.k, read.v))
    nll = pd.Series(score(task, output.logits)["nll"]).groupby(task.seeds.numpy()).mean()
    assert rows.loc["steps + repair", "nll"].tolist() == pytest.approx(nll.tolist(), rel=1e-4)
    more = rows.loc["steps + repair", "bytes_per_token"] - rows.loc["steps", "bytes_per_token"]
    assert more.tolist() == [repair.bytes_per_token] * 2
