"""Operator families by name: those of this package and those that others register.

A family is a class with a decorator, also in a notebook cell:

    @register_family("mine")
    class Mine(FoldedOperator): ...

A package offers its families as entry points of the group `cachemedic.families`, as this one does in pyproject.toml:
the module of a family is imported when its name is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from cachemedic.core.errors import nearest_valid
from cachemedic.core.registry import Registry

GROUP = "cachemedic.families"

_families: Registry[type[Any]] = Registry("operator family")
Family = TypeVar("Family", bound=type)


def register_family(name: str) -> Callable[[Family], Family]:
    """A class decorator that makes `RepairOperator.create(name, ...)` and `from_pretrained` know the class.

    A cell that is run again replaces its own class. Raises `ValueError` for the name of another class.
    """

    def register(cls: Family) -> Family:
        offered = _offered().get(name)
        if offered is not None and offered.value != f"{cls.__module__}:{cls.__qualname__}":
            raise ValueError(f"operator family {name!r} is {offered.value} already: choose another name")
        _families.add(name, cls, cls)
        return cls

    return register


def family_names() -> list[str]:
    """The names of all families."""
    return sorted({*_families, *_offered()})


def family_class(name: str) -> type[Any]:
    """The class of a family, a `RepairOperator`. Raises `ValueError` for an unknown name."""
    if name not in _families:
        if name not in _offered():
            raise nearest_valid("operator family", name, family_names())
        _offered()[name].load()  # its decorator registers it
    return _families[name]


def _offered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
