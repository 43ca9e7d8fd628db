"""A few seconds of `make torture`: damaged files and odd values give one clear error, or what is right."""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_project import ROOT

from damaged_files import DAMAGES, WRONG, file_kinds
from odd_values import ODD, TAKEN, calls
from torture import damage_one, give_one

QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return file_kinds(tmp_path_factory.mktemp("files") / "of each kind")


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    return calls(tmp_path_factory.mktemp("saved"))


def test_whole_files_are_read_again(kinds):
    for kind in kinds.values():
        assert kind.read(kind.folder) == kind.read(kind.folder)


@QUICK
@given(st.data())
def test_a_damaged_file_is_refused_or_read_right(kinds, data):
    kind = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    name = data.draw(st.sampled_from(sorted(kind.swapped)))
    found, said = kind.damaged(name, data.draw(st.sampled_from(DAMAGES)), data.draw(st.integers(0, 2**40)))
    assert found != WRONG, said


def test_what_is_no_odd_value_is_taken(functions):
    with warnings.catch_warnings(action="ignore"):
        for name, call in functions.items():
            assert call.with_odd(*next(iter(call.arguments().items()))) == (TAKEN, ""), name


@QUICK
@given(st.data())
def test_an_odd_value_is_taken_or_refused_in_one_line(functions, data):
    call = functions[data.draw(st.sampled_from(sorted(functions)))]
    argument, value = data.draw(st.sampled_from(sorted(call.arguments()))), data.draw(st.sampled_from(ODD))
    with warnings.catch_warnings(action="ignore"):
        found, said = call.with_odd(argument, value)
    assert found != WRONG, said


def test_what_is_read_wrong_is_seen(kinds, monkeypatch):
    kind = kinds["checkpoint"]
    monkeypatch.setattr("damaged_files.read_tensors", lambda path: ({}, {"size": path.read_bytes()}))
    assert kind.damaged("checkpoint.safetensors", "flip", 8000)[0] == WRONG


def test_rounds_can_be_repeated(kinds, functions):
    for one, of in ((damage_one, kinds["result"]), (give_one, functions["CorruptionSpec"])):
        assert one(of, np.random.default_rng(3))[1:] == one(of, np.random.default_rng(3))[1:]


def test_the_committed_counts_hold_nothing_wrong():
    lines = (ROOT / "docs" / "torture.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("|") and line[-3].isdigit()]
    assert len(rows) > 20
    for name, rounds, refused, good, wrong in rows:
        assert int(wrong) == 0, name
        assert int(rounds) == int(refused) + int(good) > 0
