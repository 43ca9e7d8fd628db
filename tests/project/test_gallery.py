"""GALLERY.md shows the figures of now."""

import re

from toy_project import ROOT

import gallery


def test_the_gallery_is_current_and_every_figure_is_there() -> None:
    text = (ROOT / "GALLERY.md").read_text(encoding="utf-8")
    assert text == "\n".join(gallery.gallery()) + "\n", "run `python3 tools/gallery.py`"
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert sorted(shown) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "figures").glob("*.png"))
    assert all((ROOT / path).is_file() for path in re.findall(r"\]\(((?:results|notebooks)/[^)]*)\)", text))
