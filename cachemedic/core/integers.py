"""Whole numbers of any kind, as plain ones within their range."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from operator import index
from typing import Any

from cachemedic.core.errors import shown

LONGEST = 1024  # numbers of a list: no model has more layers, no sweep more runs
LARGEST_SEED = 2**64 - 1  # what generators of torch take


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` as a plain int from `least` to `most` (None: any).

    Raises `TypeError` unless it is an integer of some kind (NumPy's count, 2.0 does not), `ValueError` out of range.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = int(index(value))
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {shown(value)}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        allowed = f"from {least} to {most}" if most is not None else f"{least} or more"
        raise ValueError(f"{name} must be {allowed}, not {number}")
    return number


def whole_numbers(name: str, values: Any, least: int | None = None, most: int | None = None) -> tuple[int, ...]:
    """The numbers of a list, tuple, range or array as plain ints, `LONGEST` at most.

    Raises `TypeError` for anything else, `ValueError` for too many and for one out of range.
    """
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a list of whole numbers, such as [0, 1], not {shown(values)}")
    found = list(islice(values, LONGEST + 1))
    if len(found) > LONGEST:
        raise ValueError(f"{name} holds more than {LONGEST} numbers")
    return tuple(whole_number(f"a number of {name}", value, least, most) for value in found)


def seed_number(seed: Any) -> int:
    """A seed as a plain int. Raises as `whole_number`: generators take 0 to 2^64 - 1."""
    return whole_number("seed", seed, 0, LARGEST_SEED)
