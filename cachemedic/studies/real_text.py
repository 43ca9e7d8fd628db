"""How well a base reads text from outside, with clean and with erased cache.

    python -m cachemedic.studies.real_text embedded-wikipedia /data/wikitext-2 /data/sst2

The text is not part of the repository, so that `make reproduce` does not make these files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cachemedic.data.text_source import TextSource
from cachemedic.models.load import load_base
from cachemedic.studies.base_report import Effort, measure
from cachemedic.studies.run import ROOT, Run

SEEDS = (0, 1, 2, 3)
EFFORT = Effort(perplexity=60, sentiment=218, needle=10, windows=48)  # 4 x 218: all reviews of the SST-2 split


def base_scores(name: str, source: TextSource, folder: Path = ROOT) -> None:
    """Writes base_scores.csv and base_needle.csv below results/real_text."""
    run = Run("paper", folder, base=name, **source.origin, seeds=list(SEEDS))
    report = measure(load_base(name), SEEDS, EFFORT, source)
    run.write_csv(report.scores, "real_text/base_scores")
    run.write_csv(report.needle, "real_text/base_needle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="whose scores are measured")
    parser.add_argument("documents", help="folder or name")
    parser.add_argument("reviews", help="folder or name")
    options = parser.parse_args()
    base_scores(options.base, TextSource(options.documents, options.reviews))


if __name__ == "__main__":
    main()
