"""GALLERY.md shows the figures of now."""

import re

from toy_project import ROOT

import gallery
from cachemedic.studies import paper_numbers


def test_the_gallery_is_current_and_every_figure_is_there() -> None:
    text = (ROOT / "GALLERY.md").read_text(encoding="utf-8")
    assert text == "\n".join(gallery.gallery()) + "\n", "run `python tools/gallery.py`"
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert sorted(shown) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "figures").glob("*.png"))
    assert all((ROOT / path).is_file() for path in re.findall(r"\]\(([^)]*)\)", text))


def test_what_was_found_stands_below_its_figure_with_numbers() -> None:
    text = (ROOT / "GALLERY.md").read_text(encoding="utf-8")
    below = text.partition("figures/rank.png")[2].partition("## ")[0]
    (claim,) = (claim for claim in paper_numbers.load() if "figures/rank.pdf" in claim.shown)
    assert claim.says in below
    assert all(number.plain(ROOT / "results") in below for number in claim.numbers)
