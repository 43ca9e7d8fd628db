"""The valence objective in the trainer: what it sees, what it adds up, and its place beside the canonical one."""

import json
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import jsonschema
import pytest
import torch
from small_models import shaken
from tiny_training import CONFIG, linear_map, log_lines, parameters, tiny_bank, tiny_base
from tiny_valence import feeling, trainer_of

import cachemedic
from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.apply import Mixture
from cachemedic.models.cache import unstack_cache
from cachemedic.repair.attach import protect
from cachemedic.training.config import TrainConfig
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.gate import MercyGate
from cachemedic.training.valence.objective import ValenceObjective
from cachemedic.training.valence.quantiser import QuantiserConfig
from cachemedic.training.valence.saliency import saliency
from cachemedic.training.valence.weights import valence_weights

SCHEMAS = Path(cachemedic.__file__).parent / "schemas"
SCHEMA = json.loads((SCHEMAS / "log_record.schema.json").read_text())
VALENCE = ValenceObjective(sampled=3)
pytestmark = [pytest.mark.usefixtures("_calibrated"), pytest.mark.filterwarnings("ignore:a probe of 12")]


def slow_states(trainer: Trainer, drawn, run: int, repaired: bool) -> torch.Tensor:
    """Hidden states [B, L, M, w] of one run or of its teacher, by a plain cache and transformers' own outputs."""
    bank, model = trainer.bank, trainer.base.model
    seed = run // len(trainer.config.objectives)
    stored = (
        [x[seed] for x in (drawn.keys, drawn.values)]
        if repaired
        else [x[drawn.rows[seed]] for x in (bank.keys, bank.values)]
    )
    ids = bank.ids[drawn.rows[seed], bank.prefix :]
    with protect(model, trainer.operator.select(run)) if repaired else nullcontext():
        output = model(ids, past_key_values=unstack_cache(*stored), output_hidden_states=True)
    return torch.stack(output.hidden_states[1:], 1)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_sees_the_states_of_teacher_and_student(architecture, tmp_path):
    calibrated = SeverityMap(linear_map(heads=2 if architecture == "llama" else 4))
    base = replace(tiny_base(architecture), severity_map=calibrated)
    trainer = trainer_of(base, tiny_bank(base, CONFIG.bank, tmp_path), tmp_path, VALENCE, RepairObjective())
    shaken(trainer.operator)
    drawn = trainer.draw(2)
    with torch.no_grad():
        seen = trainer.forward(drawn).valence
        for run in (0, 3):
            teacher, student = (slow_states(trainer, drawn, run, repaired) for repaired in (False, True))
            torch.testing.assert_close(seen.hidden_clean[run], teacher, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(seen.hidden_rep[run], student, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(seen.future_rep[run], feeling(student[:, -1]), rtol=1e-3, atol=1e-3)
            assert not torch.allclose(student, teacher, atol=1e-2)
    assert seen.attention_rep.shape == seen.hidden_rep.shape
    assert seen.order.sort(1).values.equal(torch.arange(6).expand(4, -1))


def test_the_loss_is_the_weighted_sum_of_its_terms(base, bank, tmp_path):
    trainer = trainer_of(base, bank, tmp_path, VALENCE)
    shaken(trainer.operator)
    outputs = trainer.forward(trainer.draw(0))
    terms, parts = VALENCE.terms(outputs), VALENCE(outputs)
    salient = saliency(outputs.valence.future_clean, outputs.z_clean)
    weights = valence_weights(salient, 6.5, normalise=True)
    total = 0.8 * terms["kd"] + 0.4 * terms["feature"] + 0.3 * terms["sequence"] + 0.55 * terms["valence"]
    torch.testing.assert_close(parts["loss"], (weights * total).mean(1))
    torch.testing.assert_close(parts["effective"], weights.sum(1) ** 2 / (weights**2).sum(1))
    for name in ("kd", "feature", "sequence", "valence"):
        torch.testing.assert_close(parts[name], terms[name].mean(1))
        assert (terms[name] > 0).all()
    uniform = replace(VALENCE, lam=0)(outputs)
    torch.testing.assert_close(uniform["loss"], total.mean(1))
    torch.testing.assert_close(uniform["effective"], torch.full((2,), 6.0))
    shuffled = replace(VALENCE, weighting="shuffled").weights(outputs)
    torch.testing.assert_close(shuffled, weights.gather(1, outputs.valence.order))


def test_the_excerpt_weighs_the_whole_batch_by_the_mean_weight(base, bank, tmp_path):
    excerpt = ValenceObjective.preset("excerpt")
    trainer = trainer_of(base, bank, tmp_path, excerpt)
    outputs = trainer.forward(trainer.draw(0))
    terms = excerpt.terms(outputs)
    salient = saliency(outputs.valence.future_clean, outputs.z_clean)
    weights = torch.exp(6.0 * (salient - salient.mean(1, True)) / (salient.std(1, keepdim=True) + 1e-8))
    total = (terms["cross_entropy"] + 0.8 * terms["kd"] + 0.6 * terms["valence"]).mean(1)
    torch.testing.assert_close(excerpt(outputs)["loss"], weights.mean(1) * total, rtol=1e-4, atol=1e-4)
    assert set(terms) == {"cross_entropy", "kd", "valence"}
    with pytest.raises(ValueError, match="did you mean 'excerpt'"):
        ValenceObjective.preset("exerpt")
    with pytest.raises(ValueError, match="did you mean 'sampled'"):
        ValenceObjective.preset("excerpt", sample=3)


def test_features_may_be_attention_outputs(base, bank, tmp_path):
    trainer = trainer_of(base, bank, tmp_path, VALENCE)
    outputs = trainer.forward(trainer.draw(0))
    by = {name: replace(VALENCE, features=name).terms(outputs)["feature"] for name in ("hidden", "attention", "both")}
    torch.testing.assert_close(by["both"], by["hidden"] + by["attention"])
    assert not torch.allclose(by["hidden"], by["attention"])


def test_sampled_sequences_are_scored_by_student_and_teacher(base, bank, tmp_path):
    trainer = trainer_of(base, bank, tmp_path, replace(VALENCE, lambda_soft=0, lambda_feature=0, lambda_valence=0))
    shaken(trainer.operator)
    outputs = trainer.forward(trainer.draw(0))
    assert outputs.valence.sampled_rep.shape == (2, 6, 3)
    assert not outputs.valence.sampled_clean.requires_grad
    trainer.objective(outputs)["loss"].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trainer.operator.parameters())
    again = trainer.forward(trainer.draw(0)).valence
    assert torch.equal(again.sampled_rep, outputs.valence.sampled_rep)


def test_both_objectives_train_in_one_loop_as_they_would_alone(base, bank, tmp_path):
    both = RepairObjective(), VALENCE, replace(VALENCE, lam=0.0), RepairObjective(lambda_contr=0.0)
    together = trainer_of(base, bank, tmp_path / "all", *both)
    together.run()
    for condition, objective in enumerate(both):
        alone = trainer_of(base, bank, tmp_path / str(condition), objective)
        alone.run()
        for position, run in enumerate(together.config.runs_of(condition)):
            mine, other = parameters(together.operator.select(run)), parameters(alone.operator.select(position))
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    lines = log_lines(tmp_path / "all")
    for line in lines:
        validator.validate(line)
    of_valence = [line for line in lines if line["run_id"].endswith("condition1")]
    assert all(line["loss_id"] is None and line["loss_sequence"] > 0 for line in of_valence)
    assert all(1 <= line["effective_sequences"] <= 6 for line in of_valence)
    assert all(line["loss_sequence"] is None for line in lines if line["run_id"].endswith("condition0"))


def test_it_lowers_its_own_terms(base, bank, tmp_path):
    objective = replace(VALENCE, lam=0.0, lambda_sequence=0.0)
    mixture = Mixture({"quant_noise": 1.0}, clean_share=0.0, severities=(1.0,))
    trainer_of(base, bank, tmp_path, objective, mixture=mixture, steps=40, lr=1e-2).run()
    losses = [line["loss_total"] for line in log_lines(tmp_path)]
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])


def test_a_learned_lambda_moves_and_is_kept(base, bank, tmp_path):
    learned = replace(VALENCE, learn_lam=True)
    trainer = trainer_of(base, bank, tmp_path, VALENCE, learned)
    trainer.run()
    lam = trainer.strength["lam"].detach()
    assert (lam[[0, 2]] == 6.5).all()
    assert (lam[[1, 3]] != 6.5).all()
    again = trainer_of(base, bank, tmp_path, VALENCE, learned)
    again.resume()
    assert torch.equal(again.strength["lam"], lam)


def test_quantiser_steps_decay_under_the_valence_objective(base, bank, tmp_path):
    contrast = replace(VALENCE, contrastive=1.0)
    trainer = trainer_of(base, bank, tmp_path, VALENCE, contrast, quantiser=QuantiserConfig(2))
    for _ in range(3):  # by hand, as `run` returns what validation found best, which may be what it began with
        trainer.train_step()
    outputs = trainer.forward(trainer.draw(0))
    squares = sum(p.flatten(1).square().sum(1) for p in trainer.quantiser.parameters())
    plain, more = trainer.config.objectives
    torch.testing.assert_close(plain.terms(outputs)["regularisation"], squares[:, None].expand(-1, 6))
    assert (more.terms(outputs)["regularisation"] > plain.terms(outputs)["regularisation"]).all()
    assert (squares > 0).all()


def test_resuming_ends_in_the_same_bytes(base, bank, tmp_path):
    options = {"gate": MercyGate("proxy", threshold=0.5), "quantiser": QuantiserConfig(3)}
    whole = trainer_of(base, bank, tmp_path / "whole", VALENCE, **options)
    whole.run()
    first = trainer_of(base, bank, tmp_path / "parts", VALENCE, **options)
    first.folder.mkdir()
    for _ in range(3):
        first.train_step()
    first.save()
    second = trainer_of(base, bank, tmp_path / "parts", VALENCE, **options)
    second.run()
    torch.testing.assert_close(parameters(whole.operator), parameters(second.operator), rtol=0, atol=0)
    torch.testing.assert_close(whole.quantiser.state_dict(), second.quantiser.state_dict(), rtol=0, atol=0)


def test_keys_tell_objectives_and_options_apart(base):
    changed = [replace(VALENCE, **{f.name: v}) for f in fields(VALENCE) for v in VALUES.get(f.name, ())]
    configs = [replace(CONFIG, objectives=(o,)) for o in (RepairObjective(), VALENCE, *changed)]
    configs += [replace(CONFIG, gate=MercyGate(probe=12)), replace(CONFIG, gate=MercyGate("proxy"))]
    configs += [replace(CONFIG, quantiser=QuantiserConfig(b)) for b in (2, 3)]
    assert len({c.key(base) for c in configs}) == len(configs)


VALUES = {"lam": (0, 8.0), "alpha": ((1.0, 0.0, 0.0, 0.0),), "weighting": ("shuffled",), "lambda_soft": (0.7,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_soft": 1.0}, "lambda_soft must be 0 .off. or 0.7 to 0.9, not 1.0"),
        ({"lambda_feature": 0.6}, "0.3 to 0.5"),
        ({"lambda_sequence": 0.1}, "0.2 to 0.4"),
        ({"lambda_valence": 0.8}, "0.4 to 0.7"),
        ({"lambda_reg": 1e-3}, "1e-05 to 0.0001"),
        ({"lam": 9.0}, "5 to 8"),
        ({"temperature": 0}, "temperature must be 4 to 8, not 0"),
        ({"weighting": "shufled"}, "did you mean 'shuffled'"),
        ({"features": "logits"}, "allowed: 'attention', 'both', 'hidden'"),
        ({"sampled": 0}, "sampled must be at least 1"),
        ({"contrastive": -1.0}, "contrastive must be"),
        ({"max_weight": 0.5}, "at least 1 with normalise"),
        ({"learn_lam": True, "lam": 0.0}, "learn_lam begins at lam"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ValenceObjective(**options)


def test_what_does_not_fit_is_refused_before_long_work(base, tmp_path):
    with pytest.raises(ValueError, match="looks 2 or more tokens ahead; the bank has 1"):
        TrainConfig(objectives=(VALENCE,))
    with pytest.raises(ValueError, match="no valence head comes with base 'tiny-gpt2'"):
        Trainer(base, replace(CONFIG, objectives=(VALENCE,)), tmp_path)
