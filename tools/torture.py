"""Damages files and gives odd values, and writes docs/torture.md: nothing may be wrong in silence.

python tools/torture.py [ROUNDS]

Round i damages one file of every kind and gives one odd value to every public function
but `calibrate`, which takes minutes; it draws them with the seed i.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import trange

from damaged_files import DAMAGES, REFUSED, RIGHT, WRONG, FileKind, file_kinds
from odd_values import ODD, TAKEN, Call, calls

PAGE = Path(__file__).resolve().parents[1] / "docs" / "torture.md"
ROUNDS = 3000  # about 20 minutes
Outcome = tuple[str, str, str]  # what was tried, what became of it, and what was said


def damage_one(kind: FileKind, rng: np.random.Generator) -> Outcome:
    """One file of a kind, damaged at random."""
    name = str(rng.choice(sorted(kind.swapped)))
    damage = str(rng.choice(DAMAGES))
    at = int(rng.integers(2**40))
    return f"{name}: {damage} at {at}", *kind.damaged(name, damage, at)


def give_one(call: Call, rng: np.random.Generator) -> Outcome:
    """One argument of a function, odd at random."""
    name = str(rng.choice(sorted(call.arguments())))
    value = ODD[rng.integers(len(ODD))]
    return f"{name}={value!r}", *call.with_odd(name, value)


def page(rounds: int, files: dict[str, Counter[str]], functions: dict[str, Counter[str]]) -> str:
    """The page of these counts."""
    lines = [
        "# Damaged files and odd values",
        "",
        f"`make torture ROUNDS={rounds}` made this page. Round i, with the seed i, damages one file of every kind: a",
        "bit is flipped, the end is cut off, it is gone, or another stands in its place. Reading must refuse it with",
        "one line that names the file or its folder, or give the content that was written. It also gives one odd value",
        "to one argument of every public function but `calibrate`, which takes minutes; it must be taken, or refused",
        "with one line. Tests do the same for a few seconds.",
    ]
    for title, tried, good in (("files", files, RIGHT), ("function", functions, TAKEN)):
        lines += ["", f"| {title} | rounds | {REFUSED} | {good} | {WRONG} |", "|---|---|---|---|---|"]
        for name, counts in tried.items():
            lines.append(f"| {name} | {counts.total()} | {counts[REFUSED]} | {counts[good]} | {counts[WRONG]} |")
    return "\n".join([*lines, ""])


def main(rounds: int) -> int:
    """Runs the rounds and writes the page; the number of wrong results, which are printed."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        kinds, functions = file_kinds(Path(folder)), calls(Path(folder) / "saved")
        counts: dict[str, Counter[str]] = {name: Counter() for name in (*kinds, *functions)}
        for i in trange(rounds):
            rng = np.random.default_rng(i)
            tried = [(name, damage_one(kind, rng)) for name, kind in kinds.items()]
            tried += [(name, give_one(call, rng)) for name, call in functions.items()]
            for name, (what, result, said) in tried:
                counts[name][result] += 1
                if result == WRONG:
                    print(f"round {i}: {name}, {what}: {said}")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rounds, {n: counts[n] for n in kinds}, {n: counts[n] for n in functions}), encoding="utf-8")
    return sum(found[WRONG] for found in counts.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Damages files and gives odd values to public functions.")
    parser.add_argument("rounds", type=int, nargs="?", default=ROUNDS)
    wrong = main(parser.parse_args().rounds)
    sys.exit(f"{wrong} wrong results" if wrong else 0)
