"""Values of notebook parameters, checked before anything runs rather than where a study first uses them.

python tools/parameters.py SEEDS=[0,1] BASE=gpt2-medium     # make calls this once, before the first notebook

What takes seconds to import is imported by the check that needs it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

from cachemedic.core.errors import nearest_valid
from cachemedic.core.integers import whole_numbers
from cachemedic.data.external_text import check_documents, check_reviews
from cachemedic.repair.registry import family_names
from cachemedic.studies.jobs import AT_ONCE, check_options
from run_notebook import parameter


def check_seeds(given: Any) -> None:
    """Raises `ValueError` or `TypeError` unless these are distinct whole numbers, one or more of them."""
    seeds = whole_numbers("seeds", given)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError("seeds must be distinct whole numbers from 0 upwards, such as [0, 1]")


def check_device(given: Any) -> None:
    """Raises `ValueError` for a device that this machine does not have."""
    import torch

    cuda = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    allowed = ["cpu", *(cuda if torch.cuda.is_available() else [])]
    if given not in allowed:
        raise nearest_valid("device", given, allowed)


def check_family(given: str) -> None:
    """Raises `ValueError` for an unknown family of operators."""
    if given not in family_names():
        raise nearest_valid("operator family", given, family_names())


def check_objective(given: Any) -> None:
    """Raises `ValueError` for an objective that operators are not trained by."""
    from cachemedic.studies.sweeps import OBJECTIVES

    if given not in OBJECTIVES:
        raise nearest_valid("objective", given, OBJECTIVES)


def check_base_name(given: Any) -> None:
    """Raises `ValueError` for a base that is no name and no folder of a model."""
    from cachemedic.models.load import check_base

    check_base(str(given))


def check_executor(given: Any) -> None:
    """Raises `ValueError` for an executor that is unknown, or that this machine does not have."""
    if given not in AT_ONCE:
        raise nearest_valid("executor", given, AT_ONCE)
    if given == "slurm" and not all(map(shutil.which, ("sbatch", "srun"))):
        raise ValueError("this machine has no sbatch and srun: start make where jobs are submitted to Slurm")


CHECKS: Mapping[str, Callable[[Any], None]] = {
    "SEEDS": check_seeds,
    "FAMILY": lambda given: check_family(str(given)),
    "OBJECTIVE": check_objective,
    "DEVICE": check_device,
    "BASE": check_base_name,
    "TEXT": lambda given: check_documents(str(given)),
    "EXECUTOR": check_executor,
    "CLUSTER": check_options,
    "REVIEWS": lambda given: check_reviews(str(given)),
}


def check(assignment: str) -> None:
    """Raises `ValueError` or `TypeError` for a value that its parameter cannot take, or an unknown parameter."""
    name, given = parameter(assignment)
    if name not in CHECKS:
        raise nearest_valid("parameter", name, CHECKS)
    CHECKS[name](given)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        try:
            check(word)
        except (ValueError, TypeError) as error:
            sys.exit(f"error: {word}: {error}")
