"""Configurations of training: their keys, and what is refused before long work."""

from dataclasses import replace

import pandas as pd
import pytest
from tiny_training import CONFIG, tiny_base

from cachemedic.corruption import severity
from cachemedic.corruption.apply import Mixture
from cachemedic.training import trainer as train
from cachemedic.training.config import stack_objectives
from cachemedic.training.objective import RepairObjective
from cachemedic.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("_calibrated")


def test_the_key_names_configuration_and_base(base):
    assert CONFIG.key(base) == replace(CONFIG).key(base)
    others = {"rank": 2}, {"seeds": (3,)}, {"mixture": Mixture().without("gaussian")}
    keys = {replace(CONFIG, **options).key(base) for options in others}
    assert len(keys | {CONFIG.key(base), CONFIG.key(tiny_base("llama"))}) == 5
    local = CONFIG.key(replace(base, name="/models/x"))
    assert "/" not in local


def test_operators_of_another_severity_map_have_another_name(base):
    used, before = severity.shipped_map().rows, CONFIG.key(base)
    other = severity.SeverityMap(used.assign(parameter=3 * used["parameter"]))
    assert CONFIG.key(replace(base, severity_map=other)) != before


def test_operators_do_not_change_their_name_with_types_that_they_do_not_see(base):
    used = severity.shipped_map().rows
    more = pd.concat([used, used[used["type"] == "gaussian"].assign(type="mine")])
    assert CONFIG.key(replace(base, severity_map=severity.SeverityMap(more))) == CONFIG.key(base)


def test_the_shipped_map_measured_again_makes_no_other_name():
    shipped, config = severity.shipped_map().rows, replace(CONFIG, mixture=Mixture(base="tiny"))
    keys = []
    for factor in (1.0, 1.001, 1.1):
        measured = shipped.assign(parameter=factor * shipped["parameter"], config_hash="another column")
        base = replace(tiny_base("llama"), severity_map=severity.SeverityMap(measured.iloc[::-1]))
        keys.append(config.key(base))
    assert keys[0] == keys[1] != keys[2]


def test_conditions_are_stacked_seed_major():
    stacked = stack_objectives((RepairObjective(), RepairObjective(lambda_id=2.0)), seeds=2)
    assert stacked.lambda_id == (1.0, 2.0, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"\[2.0, 3.0\]"):
        stack_objectives((RepairObjective(), RepairObjective(temperature=3.0)), seeds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrupted_layers": "some"}, "corrupted_layers must be 'all' or 'protected', not 'some'"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
        ({"seeds": ()}, "at least one"),
        ({"objectives": ()}, "at least one condition"),
        ({"steps": -1}, "steps must be from 0 to 10000000, not -1"),
        ({"lr": 0.0}, "lr must be a positive number, not 0.0"),
        ({"clip": -1.0}, "clip must be a positive number"),
        ({"batch": 13}, "bank of 24 samples is too small for 2 seeds with batches of 13"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "a"}, "did you mean 'A'|allowed: 'A', 'B', 'C'"),
        ({"layers": (1, 3)}, "layer 3 is out of range: the model has layers 0 to 2"),
        ({"rank": 9}, "rank 9 is out of range"),
        ({"apply_to": "KVV"}, "did you mean 'KV'"),
        ({"mixture": Mixture(base="embedded-gpt")}, "not calibrated for base 'embedded-gpt'"),
        ({"objectives": (RepairObjective(), RepairObjective(temperature=1.0))}, "share the temperature"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_before_long_work(options, message, base, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "open_bank", lambda *_: pytest.fail("the bank came first"))
    with pytest.raises(ValueError, match=message):
        Trainer(base, replace(CONFIG, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()
