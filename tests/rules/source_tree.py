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
    for_types: bool  # under `if TYPE_CHECKING:`: not there when the program runs

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
    tree = ast.parse(path.read_text(), str(path))
    for_types = {id(inner) for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    for node in statements:
        for name in _names_of(node):
            assert name[0] != ".", f"{path}:{node.lineno}: relative import (ruff refuses these)"
            yield Import(importer, name, node.lineno, id(node) in for_types)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _names_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module or ''}.{alias.name}" for alias in node.names]


def module_of(name: str, package: str) -> str | None:
    """The module of `package` that an imported name is or lies in; None for a name from elsewhere."""
    known = modules(package)
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None
