"""Writes GALLERY.md: every figure, with the question of its notebook, what was found, the command, and the data.

    python tools/gallery.py

What was found are the claims of paper/numbers.toml that rest on the figure; their numbers are kept current as README's.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from cachemedic.studies import paper_numbers

ROOT = Path(__file__).resolve().parents[1]


def first_page(name: str) -> tuple[str, str]:
    """Title of a notebook, and the paragraph that says what it asks."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join(cells[0]["source"])
    title = text.splitlines()[0].removeprefix("# ")
    paragraph = next((part for part in text.split("\n\n") if part.startswith("**Asked.**")), "")
    return title, re.sub(r"\s+", " ", paragraph.removeprefix("**Asked.**")).strip()


def found(figure: str, claims: Iterable[paper_numbers.Claim]) -> Iterator[str]:
    """A line for each claim that a figure shows, with its numbers, each behind its name in the paper."""
    for claim in claims:
        if f"figures/{figure}.pdf" in claim.shown:
            values = (f"`{n.name}` <!--{n.name}-->{n.plain(ROOT / 'results')}<!---->" for n in claim.numbers)
            yield f"- {claim.says}: {', '.join(values)}."


def gallery() -> Iterator[str]:
    """The lines of the page."""
    yield "# Gallery"
    yield ""
    yield "Every figure as it is committed, and what was found. `python tools/gallery.py` makes this page from"
    yield "`notebooks/graph.toml` and `paper/numbers.toml`; [the claims of the paper](paper/CLAIMS.md) say which rows a"
    yield "number stands for."
    claims = paper_numbers.load(ROOT)
    graph = tomllib.loads((ROOT / "notebooks" / "graph.toml").read_text(encoding="utf-8"))
    for name, made in graph.items():
        title, asked = first_page(name)
        data = ", ".join(f"[{csv}](results/{csv}.csv)" for csv in made.get("csv", ()))
        yield from ("", f"## {title}", "", *([asked, ""] if asked else []))
        yield f"Notebook: [{name}](notebooks/{name}.ipynb). Data: {data}."
        for figure in made.get("figures", ()):
            yield from ("", f"`make figures/{figure}.pdf`", "", f"![{figure}](figures/{figure}.png)")
            if lines := list(found(figure, claims)):
                yield from ("", *lines)


def main() -> None:
    (ROOT / "GALLERY.md").write_text("\n".join(gallery()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
