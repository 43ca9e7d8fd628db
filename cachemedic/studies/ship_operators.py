"""Makes the operators that ship, for each embedded base.

    python -m cachemedic.studies.ship_operators     # writes cachemedic/repair/weights/; about five minutes on one core

A, B and C are the first seed of notebook 08, from trained/. D and E are calibrated, their trust network
fitted on faults of many kinds; their joint model lies with the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cachemedic.models.load import WEIGHTS, Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.shipped import FOLDER
from cachemedic.studies.family_study import folded
from cachemedic.token.joint_calibrate import calibrate
from cachemedic.token.joint_files import joint_name

BASES = ("embedded-gpt2", "embedded-llama")
SEEDS = (0, 1, 2, 3, 4)  # of the paper profile
TRAINED = Path(__file__).parents[2] / "trained"


def trained_operators(base: Base) -> Iterator[RepairOperator]:
    """A, B and C under the canonical objective: the run of the first seed."""
    for config in folded(base, SEEDS).values():
        yield RepairOperator.from_pretrained(TRAINED / config.key(base)).select(0)


def main() -> None:
    for name in BASES:
        base = load_base(name)
        for operator in trained_operators(base):
            operator.save_pretrained(FOLDER / operator.family / name)
        for family in ("D", "E"):
            operator = calibrate(RepairOperator.create(family, base.model.config, layers="all"), base)
            (WEIGHTS / name / joint_name(operator.calibrated.digest)).write_bytes(operator.calibrated.as_bytes())
            operator.save_pretrained(FOLDER / family / name)


if __name__ == "__main__":
    main()
