"""Writes the site to build/site: gallery, guides, executed notebooks, paper and API.

    python tools/site_pages.py

Notebooks are shown as they were last executed in the paper profile; one that was not executed is shown without output.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import markdown2
import nbconvert
import pdoc
from tqdm import tqdm

from graph import ROOT

EXECUTED = ROOT / "build" / "notebooks" / "paper"
GUIDES = (
    "CONTRIBUTING.md",
    "paper/CLAIMS.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
)
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>CacheMedic++</title>
<style>body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font-family: sans-serif }}
img {{ max-width: 100% }} td, th {{ padding: 0 0.5rem; text-align: left }}</style>
<p>{links}</p>{body}</html>
"""


def page(markdown: str, to_root: str = "") -> str:
    """A Markdown file of the repository as HTML, with links to the pages of the site; `to_root`: from where it lies."""
    body = markdown2.markdown((ROOT / markdown).read_text(encoding="utf-8"), extras=["fenced-code-blocks", "tables"])
    places = {"Gallery": "index.html", "API": "api/index.html", "Paper": "main.pdf"}
    places |= {Path(guide).stem.capitalize(): guide.replace(".md", ".html") for guide in GUIDES}
    links = " · ".join(f'<a href="{to_root}{place}">{name}</a>' for name, place in places.items())
    return PAGE.format(links=links, body=re.sub(r'(href="(?!https?:)[^"]*)\.(?:ipynb|md)"', r'\1.html"', body))


def build(site: Path, notebooks: Sequence[str], rooms: Sequence[str]) -> None:
    """Writes the site with some notebooks and rooms of the package into a folder, which is emptied before."""
    shutil.rmtree(site, ignore_errors=True)
    for folder in ("figures", "results", "paper/tables"):
        shutil.copytree(ROOT / folder, site / folder)
    shutil.copy(ROOT / "paper" / "main.pdf", site)
    exporter = nbconvert.HTMLExporter()
    (site / "notebooks").mkdir()
    for name in tqdm(notebooks, desc="notebooks"):
        executed = EXECUTED / f"{name}.ipynb"
        html, _ = exporter.from_filename(str(executed if executed.exists() else ROOT / "notebooks" / f"{name}.ipynb"))
        (site / "notebooks" / f"{name}.html").write_text(html, encoding="utf-8")
    pdoc.pdoc("cachemedic", *(f"cachemedic.{room}" for room in rooms), output_directory=site / "api")
    (site / "docs").mkdir()
    for guide in GUIDES:
        (site / guide).with_suffix(".html").write_text(page(guide, "../" * guide.count("/")), encoding="utf-8")
    (site / "index.html").write_text(page("GALLERY.md"), encoding="utf-8")


if __name__ == "__main__":
    place = ROOT / "build" / "site"
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    build(place, names, sorted(path.parent.name for path in (ROOT / "cachemedic").glob("*/__init__.py")))
    print(place / "index.html")
