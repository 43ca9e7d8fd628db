"""The real-text confirmation: scores of a base on outside text, and the results of notebook 13 on it, kept apart.

    python -m cachemedic.studies.pretraining.train wikipedia --text /data --out /models
    python -m cachemedic.studies.real_text /models/embedded-wikipedia /data/wikitext-2 /data/sst2
    make 13_second_model BASE=/models/embedded-wikipedia TEXT=/data/wikitext-2 REVIEWS=/data/sst2
    python -m cachemedic.studies.real_text --adopt build/paper,base=...

The text is not part of the repository, so that `make reproduce` does not make these files: the second command writes
results/real_text/base_scores.csv, the last one copies what the third made to results/real_text/, figures/ and
paper/tables/.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

from cachemedic.core.files import read_sealed, seal, write_atomically
from cachemedic.data.text_source import TextSource
from cachemedic.models.load import load_base
from cachemedic.studies.base_report import Effort, measure
from cachemedic.studies.run import ROOT, Run

SEEDS = (0, 1, 2, 3)
EFFORT = Effort(perplexity=60, sentiment=218, needle=10, windows=48)  # 4 x 218: all reviews of the SST-2 split
NOTEBOOK = "second_model"  # what its files are called


def base_scores(name: str, source: TextSource, folder: Path = ROOT) -> None:
    """Writes results/real_text/base_scores.csv: how well a base reads the text, with clean and with erased cache."""
    run = Run("paper", folder, base=name, **source.origin, seeds=list(SEEDS))
    report = measure(load_base(name), SEEDS, EFFORT, source)
    run.write_csv(report.scores, "real_text/base_scores")
    run.write_csv(report.needle, "real_text/base_needle")


def adopt(variant: Path, root: Path = ROOT) -> list[Path]:
    """Copies the results of notebook 13 from the folder of a variant to their place in `root`; returns where they are.

    Raises `ValueError` if there are none, or if a CSV is not the one that its sidecar records.
    """
    tables = sorted((variant / "results").glob(f"{NOTEBOOK}_*.csv"))
    if not tables:
        raise ValueError(f"{variant} holds no results of notebook 13")
    targets = {path: Path("results/real_text") / path.name.removeprefix(f"{NOTEBOOK}_") for path in tables}
    written = {}
    for path, target in targets.items():
        sidecar = read_sealed(path.with_suffix(".json"))
        if hashlib.sha256(path.read_bytes()).hexdigest() != sidecar["sha256"]:
            raise ValueError(f"{path} is not the file that its sidecar records")
        written[target] = path.read_bytes()
        written[target.with_suffix(".json")] = seal(sidecar | {"file": target.as_posix()})
    for path in [*variant.glob(f"figures/{NOTEBOOK}*"), *variant.glob(f"paper/tables/{NOTEBOOK}*")]:
        renamed = path.relative_to(variant).with_name(path.name.replace(NOTEBOOK, "real_text"))
        data = path.read_bytes()
        if path.suffix == ".tex":
            data = re.sub(rf"tab:{NOTEBOOK}", "tab:real_text", data.decode()).encode()
        written[renamed] = data
    for target, data in written.items():
        write_atomically(root / target, data)
    return [root / target for target in written]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="whose scores are measured")
    parser.add_argument("documents", nargs="?", help="folder or name")
    parser.add_argument("reviews", nargs="?", help="folder or name")
    parser.add_argument("--adopt", type=Path, metavar="FOLDER", help="results of notebook 13 to be copied")
    options = parser.parse_args()
    if options.adopt:
        print(*adopt(options.adopt), sep="\n")
    elif options.reviews:
        base_scores(options.base, TextSource(options.documents, options.reviews))
    else:
        parser.error("give a base, documents and reviews, or --adopt FOLDER")


if __name__ == "__main__":
    main()
