"""A training step against the slow way, and what it leaves alone."""

from dataclasses import fields, replace

import pytest
import torch
from small_models import shaken
from tiny_training import CONFIG, linear_map, log_lines, parameters, tiny_bank, tiny_base

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.apply import Mixture
from cachemedic.models.cache import unstack_cache
from cachemedic.models.load import Base
from cachemedic.repair.attach import protect
from cachemedic.training.bank import Bank
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("_calibrated")


def part(bank: Bank, rows: slice) -> Bank:
    return Bank(**{f.name: getattr(bank, f.name)[rows] for f in fields(Bank)})


def slow_terms(trainer: Trainer, drawn, run: int) -> dict[str, torch.Tensor]:
    """Logits [B, M, V], identity, rho and what is hit [B, P] of one run: a plain cache, all repaired tensors formed."""
    bank, model, layers = trainer.bank, trainer.base.model, trainer.config.layers
    seed = run // len(trainer.config.objectives)
    clean = bank.keys[drawn.rows[seed]], bank.values[drawn.rows[seed]]
    corrupted = [x.clone() for x in clean]
    for whole, hit in zip(corrupted, (drawn.keys, drawn.values), strict=True):
        whole[:, trainer.first :] = hit[seed]
    operator = trainer.operator.select(run)
    with protect(model, operator, record_gates=True) as protection:
        cache = unstack_cache(*corrupted)
        logits = model(bank.ids[drawn.rows[seed], bank.prefix :], past_key_values=cache).logits
    terms = {"identity": [], "rho": [], "changed": []}
    for layer in layers:
        norms = []
        for side, before, after in zip("kv", clean, corrupted, strict=True):
            w, u = (f[0] for f in operator.factors(layer)[side])
            gate = protection.gates[layer]["kv".index(side)]
            heads = gate.shape[1] // before.shape[2]
            x, sound = (y[:, layer].repeat_interleave(heads, 1)[:, :, None] for y in (after, before))
            moved = (x @ w * gate[:, :, :, None]) @ u.T
            apart = (x + moved - sound, x - sound, moved, sound)
            norms.append([y.square().sum((1, 3, 4)).mean(1) / heads for y in apart])
        (left_k, found_k, moved_k, size_k), (left_v, found_v, moved_v, size_v) = norms
        terms["changed"].append(found_k + found_v > 0)
        terms["identity"].append((moved_k + moved_v) / (size_k + size_v + 1e-8))
        terms["rho"].append((left_k.sqrt() + left_v.sqrt()) / (found_k.sqrt() + found_v.sqrt() + 1e-8))
    return {"z_rep": logits} | {name: torch.stack(values, -1) for name, values in terms.items()}


@pytest.mark.parametrize("corrupted_layers", ["all", "protected"])
@pytest.mark.parametrize(("architecture", "family"), [("gpt2", "A"), ("gpt2", "B"), ("gpt2", "C"), ("llama", "A")])
def test_a_step_is_the_slow_one(architecture, family, corrupted_layers, tmp_path):
    calibrated = SeverityMap(linear_map(heads=2 if architecture == "llama" else 4))
    base = replace(tiny_base(architecture), severity_map=calibrated)
    config = replace(CONFIG, family=family, layers=(1, 2), corrupted_layers=corrupted_layers)
    trainer = Trainer(base, config, tmp_path, tiny_bank(base, CONFIG.bank, tmp_path))
    shaken(trainer.operator)
    drawn = trainer.draw(step=2)
    with torch.no_grad():
        outputs = trainer.forward(drawn)
        for run in range(config.runs):
            slow, seed = slow_terms(trainer, drawn, run), run // 2
            torch.testing.assert_close(outputs.z_rep[run], slow["z_rep"], rtol=1e-3, atol=1e-3)
            assert torch.equal(outputs.z_clean[run], trainer.bank.logits[drawn.rows[seed]])
            clean, hit = outputs.is_clean[run], outputs.is_corrupted[run]
            assert clean.tolist() == [event.type == "none" for event in drawn.events[seed]]
            assert torch.equal(hit, slow["changed"])
            assert not (hit & clean[:, None]).any()
            torch.testing.assert_close(outputs.identity[run][clean], slow["identity"][clean], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(outputs.rho[run][hit], slow["rho"][hit], rtol=1e-3, atol=1e-3)


def test_conditions_share_their_data_and_seeds_share_none(base, bank, tmp_path):
    trainer = Trainer(base, CONFIG, tmp_path, bank)
    drawn = [trainer.draw(step) for step in range(20)]
    first, second = (torch.cat([d.rows[seed] for d in drawn]) for seed in (0, 1))
    assert first.max() < 12 <= second.min()
    assert torch.equal(drawn[0].keys, trainer.draw(0).keys)
    assert not torch.equal(drawn[0].rows, drawn[1].rows)
    outputs = trainer.forward(drawn[0])  # operators are still the identity: conditions of a seed are alike
    torch.testing.assert_close(outputs.z_rep[0], outputs.z_rep[1])
    torch.testing.assert_close(outputs.z_rep[2], outputs.z_rep[3])


def test_a_single_overwritten_sample_receives_another_text(base, bank, tmp_path):
    mixture = Mixture({"contiguous_overwrite": 1.0}, clean_share=0.0, severities=(1.0,))
    trainer = Trainer(base, replace(CONFIG, batch=1, mixture=mixture), tmp_path, bank)
    for step in range(10):
        drawn = trainer.draw(step)
        changed = (drawn.keys != bank.keys[drawn.rows]).any()
        assert changed == any(event.is_active for events in drawn.events for event in events)
        assert changed


def test_a_type_of_no_reach_is_drawn_as_clean(base, bank, tmp_path):
    rows = linear_map()
    base = replace(base, severity_map=SeverityMap(rows[rows["type"] != "gaussian"]))
    mixture = Mixture({"gaussian": 1.0}, clean_share=0.0)
    trainer = Trainer(base, replace(CONFIG, mixture=mixture), tmp_path, bank)
    drawn = trainer.draw(0)
    outputs = trainer.forward(drawn)
    assert torch.equal(drawn.keys, bank.keys[drawn.rows])
    assert outputs.is_clean.all()
    assert not outputs.is_corrupted.any()
    assert all(record["rho_mean"] is None for record in trainer.train_step())


def test_only_the_operator_gets_a_gradient_and_the_base_stays_as_it_is(base, bank, tmp_path):
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    trainer = Trainer(base, CONFIG, tmp_path, bank)
    start = parameters(trainer.operator)
    trainer.run()
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in base.model.named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in trainer.operator.named_parameters())


def test_runs_in_one_loop_are_the_runs_trained_alone(base, bank, tmp_path):
    together = Trainer(base, CONFIG, tmp_path / "all", bank).run()
    for run in range(CONFIG.runs):
        seed, condition = divmod(run, 2)
        config = replace(CONFIG, seeds=(CONFIG.seeds[seed],), objectives=(CONFIG.objectives[condition],))
        alone = Trainer(base, config, tmp_path / str(run), part(bank, slice(12 * seed, 12 * seed + 12))).run()
        torch.testing.assert_close(parameters(together.select(run)), parameters(alone), rtol=1e-3, atol=1e-5)
    assert not torch.equal(together.select(0).u_k, together.select(1).u_k)  # the weight of contraction matters


def test_training_repairs(base, bank, tmp_path):
    mixture = Mixture({"quant_noise": 1.0}, clean_share=0.0, severities=(1.0,))
    config = replace(CONFIG, objectives=(RepairObjective(lambda_contr=0.0),), mixture=mixture, steps=40, lr=1e-2)
    trainer = Trainer(base, config, tmp_path, bank)
    trainer.run()
    losses = [record["loss_kd"] for record in log_lines(tmp_path)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_a_bf16_base_trains_like_the_fp32_one(base, bank, tmp_path):
    half = Base(tiny_base().model.bfloat16(), base.tokenizer, "half")
    records = [Trainer(b, CONFIG, tmp_path, bank).train_step() for b in (base, half)]
    for full, rounded in zip(*records, strict=True):
        assert rounded["loss_kd"] == pytest.approx(full["loss_kd"], rel=0.1, abs=0.02)
        assert rounded["rho_mean"] == pytest.approx(full["rho_mean"], rel=0.05)
