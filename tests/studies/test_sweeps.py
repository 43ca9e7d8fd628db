"""Sweeps: which conditions train together, and that each operator is the one of its condition."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import operator_for
from tiny_repair import base_of, calibrated
from tiny_training import CONFIG, linear_map, parameters, tiny_bank, tiny_base

from cachemedic.core.severity_map import SeverityMap
from cachemedic.models.load import load_base
from cachemedic.repair.folded import QueryGatedAdditive
from cachemedic.repair.registry import register_family
from cachemedic.studies import sweeps
from cachemedic.studies.family_study import token_aware_config
from cachemedic.studies.jobs import Cluster
from cachemedic.token.joint_operator import TokenAware
from cachemedic.token.token_repair import TokenRepair
from cachemedic.training import trainer as train
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer
from cachemedic.training.valence.objective import ValenceObjective

ONE = replace(CONFIG, layers=(0,), objectives=(RepairObjective(),), steps=1)
TRAIN_HIGH = """
import sys
from dataclasses import replace
from pathlib import Path
from test_sweeps import ONE, load_base, run_in, sweeps
sweeps.train_sweep(load_base("embedded-llama"), {"high": replace(ONE, rank=4)}, run_in(Path(sys.argv[1])))
"""


def run_in(folder: Path, cluster: Cluster | None = None) -> Any:
    """What training needs of a run."""
    return SimpleNamespace(trained=folder / "trained", work=folder / "work", retrain=False, cluster=cluster)


def test_operators_are_those_of_their_conditions(tmp_path, monkeypatch):
    base = replace(tiny_base(), severity_map=SeverityMap(linear_map("tiny-gpt2")))
    bank = tiny_bank(base, CONFIG.bank, tmp_path)
    monkeypatch.setattr(train, "open_bank", lambda base, config: bank)
    one = replace(CONFIG, objectives=(RepairObjective(),))
    conditions = {
        "plain": one,
        "rank 2": replace(one, rank=2),
        "free": replace(one, objectives=(RepairObjective(lambda_contr=0.0),)),
        "wide": replace(one, objectives=(RepairObjective(lambda_contr=1.0),)),
    }
    run = run_in(tmp_path)
    operators = sweeps.train_sweep(base, conditions, run)
    assert list(operators) == list(conditions)
    assert len(list(run.trained.iterdir())) == 2  # one stack for each rank
    for name, config in conditions.items():
        alone = Trainer(base, config, tmp_path / name, bank).run()
        for key, value in parameters(alone).items():
            torch.testing.assert_close(parameters(operators[name])[key], value, rtol=1e-4, atol=1e-6)
    assert not torch.equal(operators["free"].u_k, operators["wide"].u_k)


def test_a_condition_has_one_objective(tmp_path):
    with pytest.raises(ValueError, match="condition 'both' must have one objective, not 2"):
        sweeps.train_sweep(tiny_base(), {"both": CONFIG}, run_in(tmp_path))


def test_stacks_that_are_missing_are_trained_as_jobs(tmp_path):
    base = load_base("embedded-llama")
    conditions = {name: replace(ONE, rank=rank) for name, rank in {"low": 1, "middle": 2, "high": 4}.items()}
    sweeps.train_sweep(base, {"middle": conditions["middle"]}, run_in(tmp_path))
    run = run_in(tmp_path, cluster=Cluster("local", tmp_path / "jobs"))
    operators = sweeps.train_sweep(base, conditions, run)
    assert [operator.rank for operator in operators.values()] == [1, 2, 4]
    assert len(list((tmp_path / "jobs").glob("*_result.pkl"))) == 2
    # A process of its own: after torch ran on other Python threads here, sums differ in their last bits.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", TRAIN_HIGH, tmp_path / "here"], env=environment, check=True)
    alone = sweeps.train_sweep(base, {"high": conditions["high"]}, run_in(tmp_path / "here"))["high"]
    assert all(map(torch.equal, operators["high"].parameters(), alone.parameters()))


@pytest.mark.parametrize(
    ("size", "place", "layers"),
    [(2, "early", (0, 1)), (2, "late", (10, 11)), (4, "mid", (4, 5, 6, 7)), (12, "mid", tuple(range(12)))],
)
def test_blocks(size, place, layers):
    assert sweeps.block(12, size, place) == layers


def test_wrong_blocks_are_refused():
    with pytest.raises(ValueError, match="did you mean 'mid'"):
        sweeps.block(12, 2, "middle")
    with pytest.raises(ValueError, match="a block of 13 layers does not fit a model of 12"):
        sweeps.block(12, 13, "early")


def test_the_contraction_sweep_has_what_the_paper_asks_for():
    sweep = sweeps.contraction_sweep(replace(CONFIG, objectives=(RepairObjective(),)))
    objectives = [config.objectives[0] for config in sweep.values()]
    assert {o.lambda_contr for o in objectives if o.alpha_contr == 0.8} == {0.0, 0.1, 0.5, 1.0}
    assert {o.alpha_contr for o in objectives if o.lambda_contr == 0.5} == {0.5, 0.8, 0.95}
    assert sweep["contraction alone"].objectives[0].lambda_id == 0


def test_a_standard_config_takes_family_and_objective():
    base = tiny_base()
    plain = sweeps.standard_config(base, "A", (0, 1), smoke=False, steps=7)
    assert (plain.layers, plain.steps, plain.objectives) == ((0, 1, 2), 7, (RepairObjective(),))
    valence = sweeps.standard_config(base, "A", (0, 1), smoke=False, steps=7, objective="valence")
    assert valence.objectives == (ValenceObjective(),)
    assert valence.bank.split == "operator_train+reviews"
    sketch = sweeps.standard_config(base, "E", (0, 1), smoke=False, steps=7)
    assert sketch == token_aware_config(base, "E", (0, 1))
    with pytest.raises(ValueError, match="did you mean 'valence'"):
        sweeps.standard_config(base, "A", (0, 1), smoke=True, objective="valance")
    with pytest.raises(ValueError, match="unknown operator family 'F'"):
        sweeps.standard_config(base, "F", (0, 1), smoke=True)


def test_families_that_others_register_are_swept_by_where_they_act():
    @register_family("tests: kin of A")
    class KinOfA(QueryGatedAdditive):
        pass

    @register_family("tests: kin of D")
    class KinOfD(TokenAware):
        pass

    base = base_of("gpt2")
    acting, storing = (sweeps.standard_config(base, f"tests: kin of {name}", (0,), smoke=True) for name in "AD")
    assert replace(acting, family="A") == sweeps.standard_config(base, "A", (0,), smoke=True)
    assert replace(storing, family="D") == sweeps.standard_config(base, "D", (0,), smoke=True)
    assert set(sweeps.rank_sweep(acting, [2])) == {"rank 2"}
    operators = {"A": operator_for(base.model), "D": calibrated(family="tests: kin of D")}
    defenses = sweeps.defenses_of(base, operators)
    assert defenses["A"] is operators["A"]
    assert isinstance(defenses["D"], TokenRepair)


def test_sweeps_over_what_a_condition_lacks_are_refused():
    base = tiny_base()
    valence = sweeps.standard_config(base, "A", (0,), smoke=True, objective="valence")
    assert sweeps.with_and_without_contraction(valence) == {"valence": valence}
    with pytest.raises(ValueError, match="objective must be 'canonical'"):
        sweeps.contraction_sweep(valence)
    with pytest.raises(ValueError, match="family D has no rank; allowed are A, B, C"):
        sweeps.rank_sweep(sweeps.standard_config(base, "D", (0,), smoke=True), [4])


def test_the_contraction_term_on_and_off_and_ranks():
    standard = replace(CONFIG, objectives=(RepairObjective(lambda_id=2.0),))
    both = sweeps.with_and_without_contraction(standard)
    assert both["contraction"] == standard
    assert both["no contraction"].objectives == (RepairObjective(lambda_id=2.0, lambda_contr=0.0),)
    ranks = {name: config.rank for name, config in sweeps.rank_sweep(standard, [2, 3]).items()}
    assert ranks == {"rank 2": 2, "rank 3": 3}


def test_operators_of_d_and_e_repair_before_the_cache_is_read():
    base = base_of("gpt2")
    operators = {
        "A": operator_for(base.model),
        "D": calibrated(family="D"),
        "E": calibrated(family="E"),
    }
    found = sweeps.defenses_of(base, operators)
    assert found["A"] is operators["A"]
    for name in ("D", "E"):
        assert isinstance(found[name], TokenRepair)
        assert found[name].operator is operators[name]
