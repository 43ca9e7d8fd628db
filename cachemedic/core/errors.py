"""Errors for names that do not exist and for arguments of the wrong kind."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def shown(value: object) -> str:
    """A value in one line, as an error names it."""
    return " ".join(repr(value).split())


def nearest(value: object, names: Iterable[str], likeness: float = 0.4) -> str | None:
    """The name that is spelt most like the value; None if none is as alike as `likeness`, from 0 to 1."""
    return next(iter(difflib.get_close_matches(str(value), sorted(names), n=1, cutoff=likeness)), None)


def nearest_valid(kind: str, value: object, allowed: Iterable[str], besides: str = "") -> ValueError:
    """The error for an unknown name: the value, the nearest valid one and all that are allowed, `besides` in words."""
    names = sorted(allowed)
    near = nearest(value, names)
    hint = f"did you mean {near!r}? " if near else ""
    listed = [*map(repr, names), *([besides] if besides else [])]
    return ValueError(f"unknown {kind} {shown(value)}: {hint}allowed: {', '.join(listed) or 'none'}")


def check_given(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Raises `TypeError` unless an argument is of the kind that it is said to be."""
    if not isinstance(value, kind):
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        found = type(value)
        other = found.__name__ if found.__name__ not in kinds else f"{found.__module__}.{found.__name__}"
        raise TypeError(f"{name} must be a {kinds}, not a {other}")
