"""Finds a program by name or path and reads what the sandbox needs of it: Python sources, or a compiled component."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pie_core.errors import ProgramError
from pie_core.resources import inferlets_dir

ENTRY = "main.py"
MAX_SOURCE_BYTES = 16 * 2**20
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "tests"}


@dataclass(frozen=True, slots=True)
class PythonProgram:
    """Source text that the generic Python guest runs."""

    name: str
    files: tuple[tuple[str, str], ...]  # (path inside the program, text)
    entry: str


@dataclass(frozen=True, slots=True)
class ComponentProgram:
    """A WebAssembly component that exports `run` itself."""

    name: str
    path: Path


ProgramSource = PythonProgram | ComponentProgram


def shipped_programs() -> dict[str, Path]:
    """Name and folder of every program that comes with pie."""
    folders = sorted(folder for folder in inferlets_dir().iterdir() if (folder / ENTRY).is_file())
    return {folder.name: folder for folder in folders}


def find_program(name: str) -> ProgramSource:
    """A shipped program's name, or the path of a .py file, a folder with main.py, or a .wasm component.

    Raises ProgramError that lists the shipped names, or says what is wrong with the file.
    """
    shipped = shipped_programs()
    if name in shipped:
        return _read_folder(shipped[name])
    path = Path(name)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ProgramError(_not_found(name, shipped))
    if path.suffix == ".wasm":
        return ComponentProgram(path.stem, path)
    if path.suffix == ".py":
        return PythonProgram(path.stem, ((path.name, _read_text(path)),), path.name)
    raise ProgramError(f"{path}: a program is a .py file, a folder with {ENTRY}, or a .wasm component")


def _read_folder(folder: Path) -> PythonProgram:
    if not (folder / ENTRY).is_file():
        raise ProgramError(
            f"{folder}: expected a file {ENTRY} with `async def main(input)`; try `pie new NAME`"
        )
    files = tuple((path.relative_to(folder).as_posix(), _read_text(path)) for path in _sources(folder))
    total = sum(len(text) for _, text in files)
    if total > MAX_SOURCE_BYTES:
        raise ProgramError(
            f"{folder}: {total:,} characters of Python source; at most {MAX_SOURCE_BYTES:,} are taken"
        )
    return PythonProgram(folder.resolve().name, files, ENTRY)


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in SKIPPED_FOLDERS and not path.name.startswith("."):
            yield from _sources(path)
        elif path.suffix == ".py" and path.is_file():
            yield path


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_SOURCE_BYTES:
            raise ProgramError(f"{path}: {size:,} bytes; at most {MAX_SOURCE_BYTES:,} of source are taken")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProgramError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read: {error.strerror}") from None


def _not_found(name: str, shipped: dict[str, Path]) -> str:
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no program {name!r}: neither a file or folder nor one of the shipped {', '.join(shipped)}{hint}"
