"""Things by name, to which any module, a notebook among them, can add its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from cachemedic.core.errors import nearest_valid

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Entries by name, in the order in which they were added; `kind` names them in errors.

    An unknown name raises `ValueError` with the nearest valid one.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._sources: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, entry: Entry, definition: Any) -> None:
        """Adds an entry made from a `definition`, a class or function.

        A definition that is run again, as in a notebook cell, replaces its entry. Raises `ValueError` if the name
        belongs to another one.
        """
        source = (definition.__module__, definition.__qualname__)
        if self._sources.setdefault(name, source) != source:
            raise ValueError(f"{self.kind} {name!r} is {'.'.join(self._sources[name])} already: choose another name")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Takes an entry back. Raises `ValueError` for an unknown name."""
        if name not in self._entries:
            raise nearest_valid(self.kind, name, self._entries)
        del self._entries[name], self._sources[name]

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise nearest_valid(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
