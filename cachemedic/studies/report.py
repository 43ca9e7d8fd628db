"""What a notebook reports: figures and LaTeX tables beside the CSVs of its `Run`, each in the place of its profile.

    report = Report(profile, base=base, device=device, seeds=seeds)
    rows = report.results("main_results")        # results/NAME.csv and its sidecar results/NAME.json, for each NAME
    report.save_figure(figure, "main_results")   # figures/main_results.pdf and .png
    report.write_table(frame, "main_results", caption="...")   # paper/tables/main_results.tex

Importing this module changes nothing; making a `Report` sets the style of figures.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from cachemedic.core.files import write_atomically
from cachemedic.studies import paper_numbers
from cachemedic.studies.drawing.style import STYLE
from cachemedic.studies.run import ROOT, Run

AUTHOR = "the CacheMedic++ contributors"


class Report(Run):
    """A run of a notebook, with the figures and tables that it draws from results."""

    def __init__(self, profile: str, folder: Path = ROOT / "build" / "lab", **parameters: Any) -> None:
        super().__init__(profile, folder, **parameters)
        plt.style.use(STYLE)
        self._shown: set[str] = set()

    def results(self, study: str, **given: Any) -> dict[str, pd.DataFrame]:
        """As `Run.results`; `found` is about these."""
        frames = super().results(study, **given)
        self._shown |= set(frames)
        return frames

    def found(self) -> Markdown:
        """What the paper claims on the strength of these results, with the numbers that they have in this run.

        Claims about another base, or about more than a smoke run computes, are left out.
        """
        sentences = []
        for claim in paper_numbers.load():
            if claim.csv in self._shown:
                own = (self.folder / "results" / f"{claim.csv}.csv").exists()
                with contextlib.suppress(ValueError):  # these results have no such rows
                    folder = self.folder if own else self.published
                    sentences.append(f"- {paper_numbers.in_words(claim, folder / 'results')}")
        return Markdown("\n".join(sentences) or "The claims of the paper are about other parameters.")

    def save_figure(self, figure: Figure, name: str) -> None:
        """Writes figures/NAME.pdf and .png, the same bytes for the same figure: no date, no program version."""
        pdf = {"Title": name, "Author": AUTHOR, "Creator": None, "Producer": None, "CreationDate": None}
        png = {"Title": name, "Author": AUTHOR, "Software": None}
        for suffix, metadata in (("pdf", pdf), ("png", png)):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=200, metadata=metadata)
            write_atomically(self.folder / "figures" / f"{name}.{suffix}", buffer.getvalue())

    def write_table(self, frame: pd.DataFrame, name: str, caption: str, digits: int = 3) -> None:
        """Writes paper/tables/NAME.tex, a booktabs table with the label `tab:NAME`.

        Text in `frame` is escaped, `caption` is LaTeX. Columns of numbers are flush right, missing values a dash.
        """
        columns = "".join("r" if pd.api.types.is_numeric_dtype(kind) else "l" for kind in frame.dtypes)
        styler = frame.style.hide(axis="index").format(precision=digits, escape="latex", na_rep="--")
        table = styler.format_index(escape="latex", axis="columns").to_latex(
            hrules=True, column_format=columns, caption=caption, label=f"tab:{name}", position_float="centering"
        )
        self._write_text(f"paper/tables/{name}.tex", table)
