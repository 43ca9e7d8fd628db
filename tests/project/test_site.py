"""`make site`: the pages are there, and what they point at."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from toy_project import ROOT

import site_pages


class Links(HTMLParser):
    """Addresses that a page points at."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    site_pages.build(folder, notebooks=["05_rank", "playground"], rooms=["core"])
    return folder


def missing(page: Path) -> list[str]:
    """Files beside the site's own that a page points at and that are not there."""
    addresses = [urlsplit(address) for address in Links(page).found]
    local = [unquote(a.path) for a in addresses if not a.scheme and not a.netloc and a.path]
    return [path for path in local if not (page.parent / path).exists()]


def test_links_of_the_gallery_resolve(site: Path) -> None:
    made = {f"notebooks/{name}.html" for name in ("05_rank", "playground")}
    left_out = {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")} - made
    assert set(missing(site / "index.html")) <= left_out
    assert made - {"notebooks/playground.html"} <= set(Links(site / "index.html").found)
    assert {"main.pdf", "api/index.html", "figures/rank.png"} <= set(Links(site / "index.html").found)


def test_notebooks_and_guides_have_pages(site: Path) -> None:
    for page in [*site.glob("notebooks/*.html"), *site.glob("docs/*.html")]:
        assert missing(page) == [], page.name
    assert "Rank: does a larger correction repair more?" in (site / "notebooks/05_rank.html").read_text()
    assert {page.stem for page in site.glob("docs/*.html")} == {page.stem for page in (ROOT / "docs").glob("*.md")}


def test_the_api_comes_from_docstrings(site: Path) -> None:
    assert "seeded by a name" in (site / "api/cachemedic/core.html").read_text()
