"""Operators that ship are found by name."""

import pytest

from cachemedic import RepairOperator, load_base
from cachemedic.repair.shipped import made_folder, shipped_operators


@pytest.mark.parametrize("name", shipped_operators())
def test_a_shipped_operator_fits_the_base_that_it_is_named_after(name):
    family, base = name.split("/")
    operator = RepairOperator.from_pretrained(name)
    assert operator.family == family
    assert operator.runs == 1
    operator.check_model(load_base(base).model.config)


def test_every_family_ships_for_both_bases():
    bases = ("embedded-gpt2", "embedded-llama")
    assert {f"{family}/{base}" for family in "ABCDE" for base in bases} <= set(shipped_operators())


def test_an_unknown_name_is_told_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown operator 'E/embeded-gpt2': did you mean 'E/embedded-gpt2'"):
        RepairOperator.from_pretrained("E/embeded-gpt2")


def test_a_path_that_does_not_exist_is_told_as_such(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        RepairOperator.from_pretrained(tmp_path / "nowhere")


def test_an_operator_that_this_machine_has_not_made_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMEDIC_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ship_operators smollm2-135m"):
        RepairOperator.from_pretrained("E/smollm2-135m")
    made = RepairOperator.create("A", load_base("embedded-gpt2").model.config, layers=[0])
    made.save_pretrained(made_folder("E/smollm2-135m"))
    assert RepairOperator.from_pretrained("E/smollm2-135m").family == "A"
