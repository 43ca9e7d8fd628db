"""What the playground shows for its settings."""

from __future__ import annotations

import math

import pytest

from cachemedic import load_base
from cachemedic.data.text import needle_fact, needle_question
from cachemedic.studies.playground import METHODS, Continuation, Playground, Settings, coloured, damage_types

TEXT = f"Merge two tables by a column.{needle_fact('falcon', 'copper lantern')}\n\nThe rest is <left> out."


@pytest.fixture(scope="module")
def play() -> Playground:
    return Playground(load_base("embedded-gpt2"), TEXT, needle_question("falcon"), other=3 * TEXT, written=4)


def test_a_text_breaks_and_heals(play):
    left, healed = (play.result(Settings("dropout_zero", 0.8, method=method)) for method in ("leave", "auto"))
    assert healed.clean.text.startswith(" copper lantern")
    assert healed.damaged.text == left.damaged.text == left.repaired.text != healed.clean.text
    assert healed.repaired.text == healed.clean.text
    assert max(healed.repaired.kl) < 1e-4 < 0.1 < max(healed.damaged.kl)
    assert left.report is None
    assert sum(healed.report.ways.values()) == len(healed.prompt) == sum(map(bool, healed.kinds))
    assert "".join(healed.prompt).endswith(TEXT)


def test_tokens_that_were_hit_are_suspicious(play):
    result = play.result(Settings("dropout_zero", 0.8, share=0.3, method="leave"))
    hit = [score for score, kind in zip(result.suspicion, result.kinds, strict=True) if kind]
    sound = [score for score, kind in zip(result.suspicion, result.kinds, strict=True) if not kind]
    assert min(hit) > 1 > sorted(sound)[len(sound) // 2]


@pytest.mark.parametrize("damage", damage_types())
def test_a_severity_of_zero_changes_nothing(play, damage):
    result = play.result(Settings(damage, 0.0, method="restore"))
    assert result.damaged == result.repaired
    assert result.damaged.text == result.clean.text
    assert not any(result.kinds)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_page_without_markup_of_the_text(play, method):
    page = play.result(Settings("gaussian", 0.4, method=method))._repr_html_()
    assert "&lt;" in page
    assert "<left" not in page
    assert "check" in page
    assert "bytes" in page


def test_what_is_not_a_number_is_darkest():
    shades = [part.partition(")")[0] for part in Continuation(("a", "b"), (math.nan, 0.0)).html().split(", 0, ")[1:]]
    assert shades == ["1.00", "0.00"]
    assert "&quot;&amp;" in coloured(["a"], [0.5], ['"&'])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"method": "recomputed"}, "recompute"),
        ({"damage": "gausian"}, "gaussian"),
        ({"share": 2}, "share"),
        ({"severity": -1}, "severity"),
    ],
)
def test_settings_out_of_range_are_named(given, named):
    with pytest.raises(ValueError, match=named):
        Settings(**given)
