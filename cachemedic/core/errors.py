"""Errors for names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_valid(kind: str, value: object, allowed: Iterable[str]) -> ValueError:
    """The error for an unknown name: the value, the nearest valid one and all that are allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {value!r}: {hint}allowed: {', '.join(map(repr, names)) or 'none'}")
