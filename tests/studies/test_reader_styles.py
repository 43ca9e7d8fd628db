"""A reader has one name, colour and marker in all figures and tables."""

from __future__ import annotations

import pytest

from cachemedic.defenses.registry import DEFENSES
from cachemedic.studies.drawing.readers import STYLES, reader_label, reader_styles


def test_no_two_readers_look_alike() -> None:
    styles = reader_styles(list(STYLES)).values()
    assert len({style["label"] for style in styles}) == len(STYLES)
    assert len({(style["color"], style["marker"]) for style in styles}) == len(STYLES)


def test_a_reader_looks_the_same_under_each_of_its_names() -> None:
    looks = reader_styles(["E", "operator E", "E, estimate", "none", "no defence"])
    assert looks["E"] == looks["operator E"] == looks["E, estimate"] != looks["none"]
    assert looks["none"] == looks["no defence"]
    assert reader_label("shadow_2bit") == "2-bit copy"


def test_all_defenses_that_ship_have_a_look() -> None:
    assert {name for name in DEFENSES if name not in STYLES} == set()


def test_conditions_of_a_sweep_keep_their_names_and_have_no_look() -> None:
    assert reader_label("lambda 0.5, alpha 0.8") == "lambda 0.5, alpha 0.8"
    with pytest.raises(ValueError, match="shadow_2bit"):
        reader_styles(["shadow_2bits"])
