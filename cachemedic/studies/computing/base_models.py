"""Base models (notebook 00): do they read well, and do they use their cache?"""

from __future__ import annotations

import pandas as pd

from cachemedic.models.load import load_base
from cachemedic.studies.base_report import Effort, measure
from cachemedic.studies.run import Run

SMOKE_EFFORT = Effort(perplexity=6, sentiment=8, needle=5, windows=16, unigram_tokens=200_000)


def results(run: Run) -> dict[str, pd.DataFrame]:
    effort = SMOKE_EFFORT if run.smoke else Effort()
    names, device = (run.parameters["base"], run.parameters["second"]), run.parameters["device"]
    reports = {name: measure(load_base(name, device), run.parameters["seeds"], effort) for name in names}
    facts = pd.DataFrame({name: report.facts for name, report in reports.items()})
    return {
        "base_models": pd.concat([report.scores for report in reports.values()]),
        "base_models_position": pd.concat([report.positions for report in reports.values()]),
        "base_models_needle": pd.concat([report.needle for report in reports.values()]),
        "base_models_facts": facts.rename_axis("fact").reset_index(),
    }
