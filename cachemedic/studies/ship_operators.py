"""Makes the operators that have a name.

    python -m cachemedic.studies.ship_operators                 # those that ship, of the embedded bases: five minutes
    python -m cachemedic.studies.ship_operators smollm2-135m    # D and E of SmolLM2, for this machine: ten minutes

A, B and C are the first seed of notebook 08, from trained/. D and E are calibrated, their trust network fitted
on faults of many kinds; the joint model of an embedded base lies with the base, and is measured where it is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from cachemedic.core.errors import nearest_valid
from cachemedic.models import smollm2
from cachemedic.models.load import WEIGHTS, Base, load_base
from cachemedic.repair.operator import RepairOperator
from cachemedic.repair.shipped import FOLDER, made_folder
from cachemedic.studies.family_study import folded
from cachemedic.studies.run import ROOT
from cachemedic.token.joint_calibrate import calibrate
from cachemedic.token.joint_files import joint_name, shipped_joint
from cachemedic.token.joint_operator import JointOperator

BASES = ("embedded-gpt2", "embedded-llama")
SEEDS = (0, 1, 2, 3, 4)  # of the paper profile


def trained_operators(base: Base) -> Iterator[RepairOperator]:
    """A, B and C under the canonical objective: the run of the first seed."""
    for config in folded(base, SEEDS).values():
        yield RepairOperator.from_pretrained(ROOT / "trained" / config.key(base)).select(0)


def calibrated_operators(base: Base) -> Iterator[JointOperator]:
    """D and E under one joint model."""
    joint = shipped_joint(base.name)
    for family in ("D", "E"):
        operator = calibrate(RepairOperator.create(family, base.config, layers="all"), base, joint=joint)
        joint = operator.calibrated
        yield operator


def ship(name: str) -> None:
    """Makes all operators of an embedded base."""
    base = load_base(name)
    for operator in trained_operators(base):
        operator.save_pretrained(FOLDER / operator.family / name)
    for operator in calibrated_operators(base):
        if not (file := WEIGHTS / name / joint_name(operator.calibrated.digest)).is_file():
            file.write_bytes(operator.calibrated.as_bytes())
        operator.save_pretrained(FOLDER / operator.family / name)


def main(names: Sequence[str]) -> None:
    for name in names or BASES:
        if name in BASES:
            ship(name)
        elif name == smollm2.NAME:
            for operator in calibrated_operators(load_base(name)):
                operator.save_pretrained(made_folder(f"{operator.family}/{name}"))
        else:
            raise nearest_valid("base", name, [*BASES, smollm2.NAME])


if __name__ == "__main__":
    main(sys.argv[1:])
