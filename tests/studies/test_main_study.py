"""What notebook 03 measures on a base: which readers and severities each task and setting has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import DOCUMENTS
from tiny_training import linear_map, tiny_base

from cachemedic.core.severity_map import SeverityMap
from cachemedic.data import text_source
from cachemedic.defenses.heuristics import NoDefense
from cachemedic.studies import main_study
from cachemedic.studies.main_study import settings


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_source, "documentation", lambda split: tuple(4 * document for document in 3 * DOCUMENTS))
        patch.setattr(main_study, "SMOKE_EXAMPLES", {"perplexity": 2, "sentiment": 2})  # needles need a longer context
        base = tiny_base()
        base = replace(base, severity_map=SeverityMap(linear_map(base.name)))
        linear = {setting: NoDefense() for setting in settings(base)}
        folder = tmp_path_factory.mktemp("grid")
        yield main_study.measure(base, linear, {"operator E": NoDefense()}, [0, 1], folder, smoke=True)


def test_every_setting_has_its_readers(measured):
    readers = measured.grid.groupby(["setting", "task"])["reader"].agg(set)
    everywhere = {"none", "operator A", "operator E", measured.heuristic}
    assert everywhere < readers["standard", "perplexity"]
    assert readers["standard", "sentiment"] == everywhere
    assert readers["protected block", "perplexity"] == {*main_study.HEURISTICS, "operator A"}
    assert not {"operator A", "operator E"} & readers["standard, mask known", "perplexity"]
    assert set(measured.kept["reader"]) > everywhere


def test_the_protected_block_lies_in_the_middle():
    base = tiny_base()
    assert settings(base)["protected block"] == ((0, 1, 2), "protected")  # a model of fewer layers is the block
    base.model.config.n_layer = 12
    assert settings(base) == {"standard": (tuple(range(12)), "all"), "protected block": ((4, 5, 6, 7), "protected")}


def test_operator_a_trains_once_per_setting_and_seed():
    configs = main_study.linear_configs(tiny_base(), [0, 1], smoke=True)
    assert list(configs) == ["standard", "protected block"]
    assert configs["standard"].corrupted_layers == "all"
    assert configs["protected block"].corrupted_layers == "protected"
