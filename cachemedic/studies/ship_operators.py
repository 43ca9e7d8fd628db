"""Makes the operators that ship: the first seed of each family of notebooks 03 and 08, on each embedded base.

python -m cachemedic.studies.ship_operators     # reads trained/, writes cachemedic/repair/weights/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cachemedic.models.load import Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.shipped import FOLDER
from cachemedic.studies.family_study import folded, headline

BASES = ("embedded-gpt2", "embedded-llama")
SEEDS = (0, 1, 2, 3, 4)  # of the paper profile
TRAINED = Path(__file__).parents[2] / "trained"


def standard_operators(base: Base) -> Iterator[RepairOperator]:
    """A, B and C under the canonical objective, D and E at 1/32 of the bytes: the run of the first seed."""
    study = headline(base, SEEDS)
    for config in (*folded(base, SEEDS).values(), study["D"], study["E"]):
        yield RepairOperator.from_pretrained(TRAINED / config.key(base)).select(0)


def main() -> None:
    for name in BASES:
        for operator in standard_operators(load_base(name)):
            operator.save_pretrained(FOLDER / operator.family / name)


if __name__ == "__main__":
    main()
