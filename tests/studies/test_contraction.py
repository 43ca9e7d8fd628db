"""rho of operators, and of the best linear maps, against caches that are really repaired."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_models import shaken
from tiny_training import CONFIG, linear_map, tiny_bank, tiny_base

from cachemedic.core.severity_map import SeverityMap
from cachemedic.corruption.apply import MIXTURE_WEIGHTS
from cachemedic.repair.operator import RepairOperator
from cachemedic.studies.contraction import measure_contraction
from cachemedic.training.bank import BankConfig

BANK = BankConfig(samples=8, prefix=10)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    base = replace(tiny_base(), severity_map=SeverityMap(linear_map("tiny-gpt2")))
    bank = tiny_bank(base, BANK, tmp_path_factory.mktemp("bank"))
    config = replace(CONFIG, bank=BANK, batch=4, objectives=CONFIG.objectives[:1])
    new = RepairOperator.create("A", base.model.config, config.layers, config.rank, runs=2)
    operators = {"new": new, "shaken": shaken(RepairOperator.stack([new.select(0), new.select(1)]), 0.1)}
    rows = measure_contraction(base, config, operators, bank, severities=(0.25, 1.0))
    return rows


def test_every_condition_type_severity_and_seed_has_a_row(measured):
    keys = ["severity", "type", "seed", "condition"]
    assert len(measured) == 2 * len(MIXTURE_WEIGHTS) * 2 * 2
    assert not measured.duplicated(keys).any()


def test_a_new_operator_leaves_everything_and_another_does_not(measured):
    by_condition = measured.groupby("condition")["rho"]
    assert by_condition.get_group("new").tolist() == pytest.approx([1.0] * 24, abs=1e-4)
    assert by_condition.get_group("shaken").mean() > 1.005  # it was moved at random


def test_references_are_in_their_order(measured):
    slack = 1e-6
    for narrow, wide in (("bound_full", "bound_rank"), ("bound_rank", "shared_rank"), ("bound_full", "shared_full")):
        # a map fitted to all cells cannot beat the one fitted to a cell on it, nor a low rank a full one
        assert (measured[narrow] <= measured[wide] + slack).all()
    assert measured["shared_rank"].mean() < 1
    assert (measured.groupby(["severity", "type", "seed"])["bound_rank"].nunique() == 1).all()
