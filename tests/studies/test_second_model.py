"""What notebook 13 runs on any base: which severity map, tasks and readers, and how make passes text on."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from tiny import DOCUMENTS
from tiny_training import linear_map, tiny_base

from cachemedic.core.severity_map import SeverityMap
from cachemedic.data import text_source
from cachemedic.data.text_source import EMBEDDED_TEXT, TextSource
from cachemedic.evaluation import severity_calibration
from cachemedic.studies import main_study, second_model
from cachemedic.studies.pretraining import train as base_training
from cachemedic.studies.pretraining.recipes import RECIPES, recipe, training_text
from cachemedic.studies.run import Run

ROOT = Path(__file__).resolve().parents[2]
LONG = tuple(4 * document for document in DOCUMENTS)


@pytest.fixture
def _long_text(monkeypatch):
    monkeypatch.setattr(text_source, "documentation", lambda split: LONG)


@pytest.mark.usefixtures("_long_text")
def test_the_shipped_map_is_for_an_embedded_base_on_the_embedded_text(monkeypatch):
    base, measured = tiny_base(), []

    def calibrate(base, task, clean):
        measured.append((base.name, len(task)))
        return pd.DataFrame(), linear_map(base.name)

    monkeypatch.setattr(severity_calibration, "calibrate_severities", calibrate)
    shipped = second_model.severity_map(replace(base, name="embedded-llama"), EMBEDDED_TEXT)
    assert set(shipped["base"]) == {"embedded-llama"}
    assert not measured
    assert set(second_model.severity_map(base, EMBEDDED_TEXT, smoke=True)["base"]) == {"tiny-gpt2"}
    monkeypatch.setattr(TextSource, "documents_of", lambda self, split: LONG)
    second_model.severity_map(replace(base, name="embedded-llama"), TextSource("wikitext2"), smoke=True)
    assert measured == [("tiny-gpt2", 24), ("embedded-llama", 24)]


@pytest.mark.usefixtures("_long_text")
def test_needles_are_for_embedded_bases():
    base = tiny_base()
    assert set(second_model.main_tasks(base, EMBEDDED_TEXT, "test", [0], smoke=True)) == {"perplexity", "sentiment"}
    known = replace(base, name="embedded-gpt2")
    assert "needle" in second_model.main_tasks(known, EMBEDDED_TEXT, "test", [0], smoke=True)


@pytest.mark.usefixtures("_long_text")
def test_the_blind_reader_is_the_best_of_the_validation_split(monkeypatch):
    base = tiny_base()
    base = replace(base, severity_map=SeverityMap(linear_map(base.name)))
    scored = pd.DataFrame({"reader": ["reset", "masking", "smoothing"], "auc": [0.1, 0.3, 0.2]})
    monkeypatch.setattr(main_study, "robustness", lambda grid: scored[scored["reader"].isin(grid["reader"])])
    readers = second_model.blind_readers(base, EMBEDDED_TEXT, [0, 1], Run("smoke"))
    assert list(readers) == ["none", "masking"]


def test_conditions_on_the_embedded_text_are_those_of_the_other_notebooks():
    base = tiny_base()
    outside = second_model.main_configs(base, TextSource("wikitext2"), [0, 1], smoke=True)
    for name, config in second_model.main_configs(base, EMBEDDED_TEXT, [0, 1], smoke=True).items():
        assert config == second_model.standard_config(base, config.family, [0, 1], smoke=True)
        assert outside[name].bank.source == TextSource("wikitext2")


def test_make_passes_text_on_to_the_notebook_that_knows_it():
    def planned(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    text = ("TEXT=wikitext2", "REVIEWS=/data/sst2")
    passed = "--parameter text='wikitext2' --parameter reviews='/data/sst2'"
    assert passed in planned("13_second_model", *text).stdout
    runs = [line for line in planned("reproduce", *text).stdout.splitlines() if "run_notebook" in line]
    assert [passed in line for line in runs] == ["13_second_model" in line for line in runs]
    assert sum(passed in line for line in runs) == 1
    refused = planned("04_contraction", *text)
    assert refused.returncode
    assert "TEXT and REVIEWS are parameters of 13_second_model" in refused.stderr


def test_recipes_describe_models_that_can_be_built():
    for name, plan in RECIPES.items():
        config = base_training.new_model(name).config
        assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
            plan.layers, plan.width, plan.vocabulary,
        )  # fmt: skip
        assert getattr(config, "num_key_value_heads", config.num_attention_heads) == plan.key_value_heads
        assert sum(stage.until == 1 for stage in plan.curriculum) == 1
    with pytest.raises(ValueError, match="unknown base 'wikipdia': did you mean 'wikipedia'"):
        recipe("wikipdia")


def test_the_third_base_needs_a_folder_of_text(tmp_path):
    with pytest.raises(ValueError, match="give --text FOLDER with wikipedia and sst2 in it"):
        training_text(recipe("wikipedia"), None)
    with pytest.raises(ValueError, match="holds no train split"):
        training_text(recipe("wikipedia"), tmp_path)
    (tmp_path / "wikipedia").mkdir()
    (tmp_path / "sst2").mkdir()
    (tmp_path / "wikipedia" / "train.txt").write_text("An article.<|endoftext|>Another")
    (tmp_path / "sst2" / "train.tsv").write_text("sentence\tlabel\ngood \t1\n")
    found = training_text(recipe("wikipedia"), tmp_path)
    assert (found.documents, list(found.reviews)) == (("An article.",), [("good", 1)])
