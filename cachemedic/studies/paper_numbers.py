"""The numbers of paper, README and gallery: made from rows of the committed CSVs, as paper/numbers.toml declares them.

    python -m cachemedic.studies.paper_numbers  # writes paper/numbers.tex, paper/CLAIMS.md and the numbers of two pages

No number of a result is typed by hand: the paper says \\ClipRecoveryGpt, README.md and GALLERY.md have the number
behind <!--ClipRecoveryGpt-->, and the table says which row and column that is.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from cachemedic.core.errors import nearest_valid
from cachemedic.core.files import read_sealed, write_atomically
from cachemedic.studies.result_files import read_result
from cachemedic.studies.run import ROOT

DECLARATION = Path("paper/numbers.toml")
OVER: Mapping[str, Callable[[pd.Series], float]] = {
    "min": pd.Series.min,
    "max": pd.Series.max,
    "mean": pd.Series.mean,
    "sum": pd.Series.sum,
    "count": pd.Series.count,
    "distinct": pd.Series.nunique,
}


@dataclass(frozen=True)
class Number:
    """A macro: which rows and column of a CSV it stands for, and how it is printed.

    where: a value, or a list of allowed values, for each column that selects rows; over: how several rows become one
    number, one of `OVER` (None: there has to be exactly one row); format: a format specification of Python; interval:
    print the limits, COLUMN_low and COLUMN_high, behind it.
    """

    name: str
    csv: str
    column: str
    where: Mapping[str, Any] = field(default_factory=dict)
    over: str | None = None
    format: str = ".3f"
    interval: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Z][A-Za-z]+", self.name):
            raise ValueError(f"{self.name!r} cannot name a macro: letters only, the first a capital")
        if self.over is not None and self.over not in OVER:
            raise nearest_valid(f"`over` of {self.name}", self.over, OVER)
        if self.interval and self.over:
            raise ValueError(f"{self.name}: an interval is that of one row, not of the {self.over} of several")

    def latex(self, results: Path) -> str:
        """The number as LaTeX. Raises `ValueError`, naming macro and CSV, if column or row is missing or ambiguous."""
        names = [self.column, *((f"{self.column}_low", f"{self.column}_high") if self.interval else ())]
        rows = self._rows(_read(results / f"{self.csv}.csv"), names)
        values = [OVER[self.over](rows[name]) if self.over else rows[name].iloc[0] for name in names]
        if any(pd.isna(value) for value in values):
            raise ValueError(f"{self._place}: the value is not defined")
        number, *limits = (_typeset(float(value), self.format) for value in values)
        return f"{number} [{', '.join(limits)}]" if limits else number

    def plain(self, results: Path) -> str:
        """The number as text."""
        text = re.sub(r"\\ensuremath\{(.*?)\}(?=[ ,\]]|$)", r"\1", self.latex(results))
        return text.replace("{,}", ",").replace("\\%", "%")

    def _rows(self, frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
        for column in (*self.where, *names):
            if column not in frame:
                raise nearest_valid(f"column in {self._place}", column, list(frame))
        for column, value in self.where.items():
            allowed = value if isinstance(value, list) else [value]
            if absent := [x for x in allowed if x not in set(frame[column])]:
                values = ", ".join(map(str, frame[column].unique()[:12])) or "no rows"
                raise ValueError(f"{self._place}: no row left has {column} = {absent[0]!r}; there are: {values}")
            frame = frame[frame[column].isin(allowed)]
        if self.over is None and len(frame) != 1:
            raise ValueError(
                f"{self._place}: {len(frame)} rows are selected; name one, or say how to take them together"
            )
        return frame

    @property
    def _place(self) -> str:
        return f"\\{self.name} from results/{self.csv}.csv"


@dataclass(frozen=True)
class Claim:
    """What the paper says on the strength of some numbers, in which section, and what shows it besides."""

    says: str
    section: str
    csv: str
    numbers: tuple[Number, ...]
    shown: tuple[str, ...] = ()


_read = cache(read_result)
IN_PAGE = re.compile(r"(?<=<!--)([A-Z][A-Za-z]+)(-->).*?(?=<!---->)")  # a name and the number behind it


def _typeset(value: float, spec: str) -> str:
    """A number for text and mathematics: no negative zero, a real minus sign, no space behind a thousands comma."""
    text = format(value, f"z{spec}")
    return "\\ensuremath{" + text.replace("%", "\\%").replace(",", "{,}") + "}"


def load(root: Path = ROOT) -> list[Claim]:
    """The claims that paper/numbers.toml declares.

    Raises `ValueError` for a file that is missing or damaged, for keys that are unknown or missing, and for a macro
    that is declared twice.
    """
    claims, seen = [], set()
    try:
        rows = tomllib.loads((root / DECLARATION).read_text(encoding="utf-8")).get("claim", [])
    except (OSError, ValueError) as error:
        raise ValueError(f"{DECLARATION} is missing or damaged: {error}") from error
    for row in rows:
        _check_keys("a claim", row, ["says", "section", "csv", "numbers"], ["where", "shown"])
        numbers = []
        for name, entry in row["numbers"].items():
            _check_keys(name, entry, ["column"], ["where", "over", "format", "interval"])
            if name in seen:
                raise ValueError(f"the macro {name} is declared twice in {DECLARATION}")
            seen.add(name)
            where = {**row.get("where", {}), **entry.pop("where", {})}
            numbers.append(Number(name, row["csv"], where=where, **entry))
        claims.append(Claim(row["says"], row["section"], row["csv"], tuple(numbers), tuple(row.get("shown", ()))))
    return claims


def _check_keys(place: str, row: Any, needed: list[str], besides: list[str]) -> None:
    if not isinstance(row, dict) or (missing := [key for key in needed if key not in row]):
        raise ValueError(f"{place} in {DECLARATION} lacks {', '.join(missing if isinstance(row, dict) else needed)}")
    for key in row:
        if key not in needed + besides:
            raise nearest_valid(f"key of {place} in {DECLARATION}", key, needed + besides)


def macros(claims: Sequence[Claim], root: Path = ROOT) -> str:
    """The content of paper/numbers.tex."""
    lines = ["% Made by `make paper` from results/*.csv, as paper/numbers.toml says. Do not edit."]
    for number in (number for claim in claims for number in claim.numbers):
        lines.append(f"\\newcommand{{\\{number.name}}}{{{number.latex(root / 'results')}\\xspace}}")
    return "\n".join(lines) + "\n"


def in_words(claim: Claim, results: Path) -> str:
    """A claim in one sentence with its numbers, from the CSVs of a folder, each with its name in the paper."""
    return f"{claim.says}: " + ", ".join(f"{number.plain(results)} (`{number.name}`)" for number in claim.numbers) + "."


def claims_page(claims: Sequence[Claim], root: Path = ROOT) -> str:
    """The content of paper/CLAIMS.md: every claim with its section, notebook, CSV, figures or tables, and values."""
    return "\n".join(_page(claims, root)) + "\n"


def _page(claims: Sequence[Claim], root: Path) -> Iterator[str]:
    yield "# What the paper claims, and where it comes from\n"
    yield "Made by `make paper` from `paper/numbers.toml`. `make verify` checks the CSVs and computes a sample of their"
    yield "rows again; `make NOTEBOOK` makes all of them anew.\n"
    yield "| claim | section | made by | data | shown in | numbers |"
    yield "|---|---|---|---|---|---|"
    for claim in claims:
        notebook = read_sealed(root / "results" / f"{claim.csv}.json")["notebook"]
        alone = "`make bench`" if claim.csv.startswith("bench_") else "`python -m cachemedic.studies.real_text`"
        made = f"[{notebook}](../notebooks/{notebook}.ipynb)" if notebook else alone
        shown = ", ".join(f"[{Path(path).stem}](../{path})" for path in claim.shown) or "text"
        values = "; ".join(f"`{number.name}` {number.plain(root / 'results')}" for number in claim.numbers)
        data = f"[{claim.csv}](../results/{claim.csv}.csv)"
        yield f"| {claim.says} | {claim.section} | {made} | {data} | {shown} | {values} |"


def page(name: str, claims: Sequence[Claim], root: Path = ROOT) -> str:
    """The content of a page, such as README.md, with the numbers of now. Raises `ValueError` for one not declared."""
    known = {number.name: number for claim in claims for number in claim.numbers}

    def number_of(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise nearest_valid(f"number in {name}", match[1], known)
        return match[1] + match[2] + known[match[1]].plain(root / "results")

    return IN_PAGE.sub(number_of, (root / name).read_text(encoding="utf-8"))


def main() -> None:
    claims = load()
    made = {"paper/numbers.tex": macros(claims), "paper/CLAIMS.md": claims_page(claims)}
    made |= {name: page(name, claims) for name in ("README.md", "GALLERY.md")}
    for path, content in made.items():
        write_atomically(ROOT / path, content.encode())


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
