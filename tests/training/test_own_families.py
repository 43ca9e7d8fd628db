"""Families of another package, of which this one names none: trained, rolled out, and used in sweeps as they come."""

import warnings
from dataclasses import replace

import pytest
import torch
from tiny import DOCUMENTS
from tiny_training import CONFIG, log_lines, parameters

from cachemedic.data import text_source
from cachemedic.defenses.defense import CachedTokens
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.registry import register_family
from cachemedic.token.token_repair import TokenOperator, TokenRepair
from cachemedic.training.forward import read_cache, repaired
from cachemedic.training.kept_operators import load_or_train
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.rollouts import Read, decode, reading

pytestmark = [
    pytest.mark.usefixtures("_calibrated"),
    pytest.mark.filterwarnings("ignore::cachemedic.repair.attach.IdleOperatorWarning"),
]


@register_family("tests: louder")
class Louder(RepairOperator):
    """Scales what attention reads; it has no factors, and so nothing that Gram space could measure."""

    @classmethod
    def initial_parameters(cls, config, generator):
        return {"gain": torch.zeros(len(config.layers))}

    def attend(self, layer, attention, query, key, value):
        output, weights = attention(query, key, value)
        gain = (1 + self.gain[:, self.layers.index(layer)]).repeat_interleave(len(output) // self.runs)
        return output * gain[:, None, None, None], weights, (None, None)


@register_family("tests: shrunken")
class Shrunken(TokenOperator):
    """Scales the stored values; it stores nothing, and asks for no ids."""

    @classmethod
    def initial_parameters(cls, config, generator):
        return {"gain": torch.zeros(len(config.layers))}

    def repair_with_prior(self, vectors, keys, values, prior, positions, kept=None, way="estimate"):
        gain = torch.ones(self.runs, values.shape[1]).index_copy(1, torch.tensor(self.layers), 1 + self.gain)
        return keys, torch.nan_to_num(values) * gain.repeat_interleave(len(values) // self.runs, 0)[
            ..., None, None, None
        ]


FAMILIES = pytest.mark.parametrize("family", ["tests: louder", "tests: shrunken"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(text_source, "documentation", lambda split: tuple(DOCUMENTS))


@FAMILIES
def test_it_trains_and_is_kept_and_loaded_again(family, base, tmp_path):
    config = replace(CONFIG, family=family, steps=3, batch=4)
    trained = load_or_train(base, config, tmp_path / "trained", tmp_path / "work")
    assert all(p.ne(0).any() for p in parameters(trained).values())
    kept = load_or_train(base, config, tmp_path / "trained", tmp_path / "work")
    assert type(kept) is type(trained)
    assert all(torch.equal(x, y) for x, y in zip(kept.parameters(), trained.parameters(), strict=True))


def test_what_acts_on_stored_tokens_is_measured_and_validated(base, bank, tmp_path):
    trainer = Trainer(base, replace(CONFIG, family="tests: shrunken"), tmp_path, bank)
    trainer.operator.gain.data.fill_(-1)  # nothing is left of the values
    with torch.no_grad():
        outputs = trainer.forward(trainer.draw(0))
    assert outputs.is_corrupted.any()
    assert (outputs.identity > 0).all()
    assert outputs.rho[outputs.is_corrupted].gt(0).all()
    assert trainer.best is not None


def test_a_family_without_terms_learns_from_distillation_alone(base, bank, tmp_path):
    trainer = Trainer(base, replace(CONFIG, family="tests: louder", steps=2), tmp_path, bank)
    trainer.run()
    assert all(line["rho_mean"] is None and line["loss_total"] == line["loss_kd"] > 0 for line in log_lines(tmp_path))


@FAMILIES
def test_rollouts_and_defenses_read_what_training_reads(family, base, bank, tmp_path):
    config = replace(CONFIG, family=family, seeds=(3,), objectives=CONFIG.objectives[:1])
    trainer = Trainer(base, config, tmp_path, bank)
    with torch.no_grad():
        trainer.operator.gain.copy_(torch.linspace(0.2, 0.6, 3))
    draw, defense = trainer.draw(1), trainer.operator.defense(base.model)
    found = read_cache(trainer.students, draw)
    ids = bank.ids[draw.rows.flatten(), : bank.prefix]
    damaged = CachedTokens.behind_padding(found.keys[0], found.values[0], ids, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # an operator that changes stored tokens is not attached to attention
        read = repaired(trainer.students, draw, found)
        with reading(base.model, read, trainer.operator):
            logits = decode(base.model, bank.ids[draw.rows.flatten(), bank.prefix :], bank.prefix)
        mended = defense.read(damaged, defense.write(damaged))
        with reading(base.model, Read(mended.k[None], mended.v[None], 1, 0), None), defense.attach(base.model):
            torch.testing.assert_close(
                decode(base.model, bank.ids[draw.rows.flatten(), bank.prefix :], bank.prefix), logits
            )
        with reading(base.model, found, None):
            plain = decode(base.model, bank.ids[draw.rows.flatten(), bank.prefix :], bank.prefix)
    assert (logits - plain).abs().max() > 1e-3
    assert isinstance(defense, TokenRepair) == (family == "tests: shrunken")
