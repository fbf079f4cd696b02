"""The repository's sources as the rules see them: modules by name, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement of one name, wherever it stands in the file."""

    importer: str
    imported: str  # the module where it is known to be one, else the name inside its module
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@cache
def modules(package: str) -> dict[str, Path]:
    """Every Python module of a top-level package: dotted name -> file."""
    return {_dotted(path): path for path in sorted((ROOT / package).rglob("*.py"))}


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(package: str) -> tuple[Import, ...]:
    return tuple(found for name, path in modules(package).items() for found in _imports_of(name, path))


def _imports_of(importer: str, path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: relative import (ruff refuses these)"
            for alias in node.names:
                yield Import(importer, f"{node.module}.{alias.name}", node.lineno)


def module_of(name: str, package: str) -> str | None:
    """The module of `package` that an imported name is or lies in; None for a name from elsewhere."""
    known = modules(package)
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None
