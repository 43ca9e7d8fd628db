"""The recipes of CONTRIBUTING.md run as they stand there, each heading as one notebook."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import DOCUMENTS
from tiny_training import tiny_base

from cachemedic.corruption.incidents import INCIDENTS
from cachemedic.corruption.types import CORRUPTIONS
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.registry import DEFENSES
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.models.cache import unstack_cache
from cachemedic.repair.operator import RepairOperator

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def blocks(heading: str) -> list[str]:
    """The python blocks below a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section is not None, f"CONTRIBUTING.md has no heading {heading!r}"
    return re.findall(r"^```python\n(.*?)^```", section.group(1), re.MULTILINE | re.DOTALL)


@pytest.fixture
def names():
    """What the recipes call base, task and cache; what they register is taken back."""
    base = tiny_base()
    documents = ["".join(DOCUMENTS[i:] + DOCUMENTS[:i]) for i in range(4)]
    task = perplexity_task(base.tokenizer, documents, n=4, prefix=128, scored=8)
    # continuations in which the model is right, so that its context is worth something
    task = replace(task, target_ids=clean_pass(base.model, task).logits.argmax(-1))
    clean = clean_pass(base.model, task)
    yield {"__name__": "notebook", "base": base, "task": task, "cache": unstack_cache(clean.k, clean.v)}
    added = ((CORRUPTIONS, "constant_offset"), (INCIDENTS, "newest_token_lost"), (DEFENSES, "mean_value"))
    for registry, name in added:
        if name in registry:
            registry.remove(name)


@pytest.mark.filterwarnings("ignore::cachemedic.repair.attach.IdleOperatorWarning")
def test_a_family_of_ones_own_is_created_by_name(names, tmp_path):
    for block in 2 * blocks("Add an operator family"):
        exec(block, names)
    names["operator"].save_pretrained(tmp_path)
    assert type(RepairOperator.from_pretrained(tmp_path)) is names["HalfOpen"]


def test_a_corruption_of_ones_own_is_used_and_calibrated(names):
    for block in 2 * blocks("Add a corruption"):  # a notebook's cells run again
        exec(block, names)
    assert names["damaged"].layers[0].keys.ne(names["cache"].layers[0].keys).all()
    assert set(names["rows"]["type"]) == {"constant_offset"}
    assert names["severity"] > 0


def test_an_incident_of_ones_own_strikes_by_its_name(names):
    for block in 2 * blocks("Add an incident"):
        exec(block, names)
    differs = (names["k"] != names["clean"].k).transpose(1, 3).flatten(2).any(2)
    assert differs.sum(1).tolist() == [1] * 4
    assert differs[:, -1].all()


def test_a_defense_of_ones_own_is_compared_by_name(names):
    for block in 2 * blocks("Add a defense"):
        exec(block, names)
    assert names["scores"]["reader"].unique().tolist() == ["none", "range_restriction", "mean_value"]
    assert names["scores"]["kl"].notna().all()
