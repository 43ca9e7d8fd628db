"""Writes the site to build/site: gallery, executed notebooks, paper and API.

    python tools/site.py

Notebooks are shown as they were last executed in the paper profile; one that was not executed is shown without output.
"""

from __future__ import annotations

import shutil

import markdown2
import nbconvert
import pdoc
from tqdm import tqdm

from graph import ROOT, Graph

SITE = ROOT / "build" / "site"
EXECUTED = ROOT / "build" / "notebooks" / "paper"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>CacheMedic++</title>
<style>body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font-family: sans-serif }}
img {{ max-width: 100% }}</style>
<p><a href="api/index.html">API</a> · <a href="main.pdf">Paper</a></p>{body}</html>
"""


def page() -> str:
    """GALLERY.md as HTML, with links to the pages of the site."""
    body = markdown2.markdown((ROOT / "GALLERY.md").read_text(encoding="utf-8"))
    return PAGE.format(body=body.replace('.ipynb"', '.html"'))


def main() -> None:
    graph = Graph()
    shutil.rmtree(SITE, ignore_errors=True)
    for folder in ("figures", "results"):
        shutil.copytree(ROOT / folder, SITE / folder)
    shutil.copy(ROOT / "paper" / "main.pdf", SITE)
    exporter = nbconvert.HTMLExporter()
    (SITE / "notebooks").mkdir()
    names = sorted(path.stem for path in graph.path("").parent.glob("*.ipynb"))
    for name in tqdm(names, desc="notebooks"):
        executed = EXECUTED / f"{name}.ipynb"
        html, _ = exporter.from_filename(str(executed if executed.exists() else graph.path(name)))
        (SITE / "notebooks" / f"{name}.html").write_text(html, encoding="utf-8")
    rooms = sorted(path.parent.name for path in (ROOT / "cachemedic").glob("*/__init__.py"))
    pdoc.pdoc("cachemedic", *(f"cachemedic.{room}" for room in rooms), output_directory=SITE / "api")
    (SITE / "index.html").write_text(page(), encoding="utf-8")
    print(SITE / "index.html")


if __name__ == "__main__":
    main()
