"""Whole numbers of any kind, as plain ones."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any

from cachemedic.core.errors import shown


def whole_number(name: str, value: Any) -> int:
    """`value` as a plain int; raises `TypeError` unless it is an integer of some kind (NumPy's count, 2.0 does not)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return int(index(value))
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {shown(value)}") from None


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """The numbers of a list, tuple, range or array as plain ints; raises `TypeError` for anything else."""
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a list of whole numbers, such as [0, 1], not {shown(values)}")
    return tuple(whole_number(f"a number of {name}", value) for value in values)
