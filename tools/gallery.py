"""Writes GALLERY.md: every figure, with the question of its notebook, the command that makes it, and its data.

python3 tools/gallery.py
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def first_page(name: str) -> tuple[str, str]:
    """Title of a notebook, and the paragraph that says what it asks."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join(cells[0]["source"])
    title = text.splitlines()[0].removeprefix("# ")
    paragraph = next((part for part in text.split("\n\n") if part.startswith("**Asked.**")), "")
    return title, re.sub(r"\s+", " ", paragraph.removeprefix("**Asked.**")).strip()


def gallery() -> Iterator[str]:
    """The lines of the page."""
    yield "# Gallery"
    yield ""
    yield "Every figure as it is committed. `python3 tools/gallery.py` makes this page from `notebooks/graph.toml`."
    graph = tomllib.loads((ROOT / "notebooks" / "graph.toml").read_text(encoding="utf-8"))
    for name, made in graph.items():
        title, asked = first_page(name)
        data = ", ".join(f"[{csv}](results/{csv}.csv)" for csv in made.get("csv", ()))
        yield from ("", f"## {title}", "", *([asked, ""] if asked else []))
        yield f"Notebook: [{name}](notebooks/{name}.ipynb). Data: {data}."
        for figure in made.get("figures", ()):
            yield from ("", f"`make figures/{figure}.pdf`", "", f"![{figure}](figures/{figure}.png)")


def main() -> None:
    (ROOT / "GALLERY.md").write_text("\n".join(gallery()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
