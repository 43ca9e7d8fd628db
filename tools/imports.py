"""Which files of a package some code imports, read from the sources without importing anything."""

from __future__ import annotations

import ast
from pathlib import Path


class Modules:
    """The modules of the package in folder `package`; relative imports are not followed (the linter forbids them)."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.files = {_dotted(path.relative_to(package.parent)): path for path in package.rglob("*.py")}
        self._direct: dict[Path, set[Path]] = {}

    def used_by(self, code: str, name: str) -> set[Path]:
        """The files that `code` imports, directly or through one another; a SyntaxError names `name`."""
        found: set[Path] = set()
        waiting = self._imports(code, name)
        while waiting:
            path = waiting.pop()
            if path in found:
                continue
            found.add(path)
            # The package's own __init__ only re-exports: which of its names are used is known where they are used.
            if path != self.package / "__init__.py":
                if path not in self._direct:
                    self._direct[path] = self._imports(path.read_text(encoding="utf-8"), str(path))
                waiting |= self._direct[path]
        return found

    def _imports(self, code: str, name: str) -> set[Path]:
        found: set[Path] = set()
        for node in ast.walk(ast.parse(code, name)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found |= self._named(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    found |= self._named(node.module, alias.name)
        return found

    def _named(self, module: str, attribute: str | None = None) -> set[Path]:
        if module not in self.files:
            return set()
        found = {self.files[module]}
        if f"{module}.{attribute}" in self.files:
            found.add(self.files[f"{module}.{attribute}"])
        elif module == self.package.name:
            found |= self._exported(attribute)
        return found

    def _exported(self, attribute: str | None) -> set[Path]:
        """The module that the package's __init__ takes a name from; all modules where that cannot be told."""
        tree = ast.parse(self.files[self.package.name].read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
            if node.module in self.files and attribute in {alias.asname or alias.name for alias in node.names}:
                return self._named(node.module, attribute)
        return set(self.files.values())


def _dotted(path: Path) -> str:
    return ".".join(path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts)
