"""The damage benchmark: what it counts, and that anything registered joins it."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny import DOCUMENTS
from tiny_repair import base_of, calibrated

from cachemedic.corruption.incidents import INCIDENTS, register_incident
from cachemedic.data.tasks import perplexity_task
from cachemedic.defenses.by_name import create_defense
from cachemedic.defenses.defense import Defense
from cachemedic.defenses.registry import DEFENSES, Calibration, register_defense
from cachemedic.evaluation.decoding import clean_pass
from cachemedic.studies.computing.incidents import ALL, benchmark, incidents_of, readers_on, turn_of
from cachemedic.studies.drawing import incidents as drawing
from cachemedic.studies.drawing.readers import reader_label
from cachemedic.studies.run import Run
from cachemedic.token.lowest_layer import stored_in_lowest_layer
from cachemedic.token.token_repair import TokenRepair

LONG = [3 * document for document in DOCUMENTS]
PREFIX = 72
GIVEN = {"base": "embedded-gpt2", "second": "embedded-gpt2", "device": "cpu", "seeds": [0, 1]}


def make_own() -> None:
    """An incident that damages nothing, and a defense that keeps the whole cache."""

    @register_incident("harmless")
    def harmless(cache):
        return cache.k.clone(), cache.v.clone()

    @register_defense("whole_copy")
    class WholeCopy(Defense):
        def write(self, clean):
            return clean

        def read(self, damaged, kept):
            return replace(damaged, k=kept.k, v=kept.v)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    make_own()
    base = base_of("llama")
    operator = calibrated("llama")
    operator.set_joint(operator.calibrated, alarms={"0.01": [1e-4, 5.0, 5.0]})
    task = perplexity_task(base.tokenizer, LONG, seeds=(0, 1), n=3, prefix=PREFIX, scored=6)
    calibration = Calibration(base.model, clean_pass(base.model, task).tokens(task))
    named = {name: create_defense(name, calibration) for name in ("none", "recompute", "whole_copy")}
    try:
        readers = {**named, "E": TokenRepair(base.model, operator)}
        return benchmark(base, task, readers, ["swapped_page", "permuted_heads", "single_bit_flip", "harmless"])
    finally:
        INCIDENTS.remove("harmless")
        DEFENSES.remove("whole_copy")


def test_every_incident_has_a_row_for_every_reader(rows: pd.DataFrame) -> None:
    assert len(rows) == 4 * 4
    assert not rows.duplicated(["incident", "reader"]).any()
    assert (rows["n_examples"] == 6).all()


def test_hashes_find_and_name_all_damage(rows: pd.DataFrame) -> None:
    hit = rows[rows["incident"] != "harmless"]
    assert (hit[["found", "named", "precise"]] == 1).all(axis=None)
    assert rows.groupby("incident")["damaged"].first().round(3).to_dict() == {
        "harmless": 0,
        "permuted_heads": 1,
        "single_bit_flip": round(1 / PREFIX, 3),
        "swapped_page": pytest.approx(16 / PREFIX, abs=0.05),  # the last page is short, the first token is the same
    }


def test_the_ids_tell_exchanged_heads(rows: pd.DataFrame) -> None:
    own = rows[rows["incident"] == "permuted_heads"].iloc[0]
    assert own["auroc"] > 0.9
    assert own["found_by_ids"] == 1


def test_shares_are_of_the_damage_that_was_done(rows: pd.DataFrame) -> None:
    by = rows.set_index(["incident", "reader"])
    assert (by.xs("none", level="reader")["repaired"].dropna() == 0).all()
    for incident in ("swapped_page", "permuted_heads", "single_bit_flip"):
        assert by.loc[(incident, "whole_copy"), "repaired"] == pytest.approx(1, abs=1e-4)
        assert by.loc[(incident, "recompute"), "repaired"] > 0.9
        share = 1 - by.loc[(incident, "E"), "kl"] / by.loc[(incident, "none"), "kl"]
        assert by.loc[(incident, "E"), "repaired"] == pytest.approx(share)
    assert by.loc["harmless"]["repaired"].isna().all(), "without damage there is no share"


def test_a_reader_without_finite_numbers_is_counted(rows: pd.DataFrame) -> None:
    assert rows["kl"].notna().all()
    assert rows[(rows["incident"] == "single_bit_flip") & (rows["reader"] == "none")]["kl"].item() > 0.01


def test_time_is_that_of_the_damaged_tokens(rows: pd.DataFrame) -> None:
    own = rows[rows["reader"] == "recompute"]
    assert own["time"].tolist() == own["damaged"].tolist()
    assert (rows[rows["reader"] == "E"]["time"] == 0).all()


def test_the_figure_and_the_tables_say_what_the_rows_say(rows: pd.DataFrame) -> None:
    figure = drawing.repaired(rows)
    (ax,) = figure.axes
    texts = [text.get_text() for text in ax.texts]
    assert texts.count("–") == 3, "the incident without damage, of three readers"
    assert "-0" not in texts
    assert [label.get_text() for label in ax.get_yticklabels()][1] == "heads permuted"
    table = drawing.found(rows)
    assert table["repaired by E"].tolist()[-1] == "no damage"
    assert set(drawing.costs(rows)["reader"]) == {"no defence", "recompute", "whole copy", reader_label("E")}


def test_keys_turn_as_the_model_turns_them() -> None:
    base = base_of("llama")
    ids = torch.arange(5, 17)[None]
    positions = torch.arange(12)[None] + 20
    turn = turn_of(base)
    assert turn is not None
    here, there = (stored_in_lowest_layer(base.model, ids, at)[0] for at in (positions, positions + 7))
    assert torch.allclose(turn(here, 7), there, atol=1e-4)
    assert torch.allclose(turn(there, -7), here, atol=1e-4)
    assert turn_of(base_of("gpt2")) is None


def test_all_incidents_are_those_that_are_registered(tmp_path) -> None:
    assert incidents_of(Run("smoke", tmp_path, **GIVEN, incidents=ALL)) == list(INCIDENTS)
    assert incidents_of(Run("smoke", tmp_path, **GIVEN, incidents=["zero_layer"])) == ["zero_layer"]


def test_a_base_without_operators_is_refused(tmp_path) -> None:
    run = Run("smoke", tmp_path, **GIVEN, incidents=ALL, defenses=[])
    with pytest.raises(ValueError, match="unknown operator 'D/tiny-gpt2'.*allowed: .*E/embedded-gpt2"):
        readers_on(run, base_of("gpt2"))
