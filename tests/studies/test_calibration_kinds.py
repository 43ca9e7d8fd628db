"""What notebook 25 makes of its grids, and the texts that it asks about."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_tokenizer
from tiny_repair import base_of, calibrated

from cachemedic.studies.computing import calibration_text as study

TYPES = ("none", "gaussian", "dropout_zero")


def grid_of(accuracy: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Accuracy by reader and type, a number a seed."""
    rows = [
        {"type": kind, "reader": reader, "seed": seed, "accuracy": value, "n_examples": 4}
        for reader, by_type in accuracy.items()
        for kind, found in by_type.items()
        for seed, value in enumerate(found)
    ]
    return pd.DataFrame(rows)


def test_accuracy_is_that_behind_faults_and_paired_with_no_defence():
    sound = [1.0, 0.75]
    grid = grid_of({
        "none": dict(zip(TYPES, (sound, [0.5, 0.5], [0.75, 0.25]), strict=True)),
        "E | prose": dict(zip(TYPES, (sound, [0.25, 0.25], [0.75, 0.25]), strict=True)),
    })  # fmt: skip
    found = study.accuracies(study.named_apart(grid)).set_index(["reader", "calibrated"])
    assert found.loc[("none", ""), "accuracy"] == pytest.approx(np.mean([0.625, 0.375]))
    assert found.loc[("none", ""), "gain"] == 0
    repaired = found.loc[("E", "prose")]
    assert repaired["gain"] == pytest.approx(-0.125)
    assert repaired["gain_low"] == pytest.approx(-0.125), "every seed loses the same"
    assert repaired["clean"] == pytest.approx(0.875)
    assert (repaired["n_seeds"], repaired["n_examples"]) == (2, 8)


def test_readers_are_named_by_what_they_were_calibrated_on():
    readers = study.readers_of(base_of("llama"), {"prose": calibrated("llama"), "all kinds": calibrated("llama")})
    names = study.named_apart(pd.DataFrame({"reader": list(readers)}))
    assert list(zip(names.reader, names.calibrated, strict=True)) == [
        ("none", ""),
        ("E, code alone", "prose"),
        ("E", "prose"),
        ("E, code alone", "all kinds"),
        ("E", "all kinds"),
    ]


def test_reviews_are_joined_by_the_token_between_texts():
    base = base_of("llama")
    documents = study.kinds_of_text(base)["reviews"]
    assert len(documents) == study.DOCUMENTS
    assert documents[0].count("Sentiment:") == study.JOINED
    ids = tiny_tokenizer()(documents[0], add_special_tokens=False)["input_ids"]
    assert ids.count(base.tokenizer.eos_token_id) == study.JOINED - 1
