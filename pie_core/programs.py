"""Finds a program by name or path: one that comes with pie, one that is installed, or files of this machine."""

from __future__ import annotations

from pathlib import Path

from pie_core.errors import NotFound, ProgramError
from pie_core.manifest import ENTRY, FILE, read_manifest
from pie_core.naming import nearest, unknown
from pie_core.program_artifact import (
    COMPONENT_SUFFIX,
    SUFFIX,
    ComponentProgram,
    ProgramSource,
    PythonProgram,
    read_folder,
    read_source,
    unpack,
)
from pie_core.program_store import ProgramStore, split_label
from pie_core.resources import inferlets_dir

__all__ = [
    "ENTRY",
    "ComponentProgram",
    "ProgramSource",
    "PythonProgram",
    "find_installable",
    "find_program",
    "shipped_programs",
    "shipped_version",
]


def shipped_programs() -> dict[str, Path]:
    """Name and folder of every program that comes with pie."""
    folders = sorted(folder for folder in inferlets_dir().iterdir() if (folder / ENTRY).is_file())
    return {folder.name: folder for folder in folders}


def shipped_version(name: str) -> str | None:
    """The version of a program that comes with pie; None where none is called so."""
    folder = shipped_programs().get(name)
    return None if folder is None else read_manifest(folder / FILE).version


def find_program(name: str, store: ProgramStore | None = None) -> ProgramSource:
    """A name or name@version, else the path of a folder or of a .py, .wasm or .inferlet file.

    Raises ProgramError that lists the known names, or says what is wrong with the file.
    """
    store = store or ProgramStore()
    path = Path(name)
    if _is_path(name):
        return _read_path(path)
    found = _named(name, store)
    if found is not None:
        return found
    if path.exists():
        return _read_path(path)
    raise ProgramError(_not_found(name, store))


def find_installable(label: str, store: ProgramStore | None = None) -> ProgramSource:
    """Like `find_program` without paths, for those who may not read the files of this machine. Raises NotFound."""
    store = store or ProgramStore()
    found = _named(label, store)
    if found is not None:
        return found
    name, version = split_label(label)
    shipped, installed = shipped_programs(), store.versions()
    if name in shipped or name in installed:
        versions = dict.fromkeys([*installed.get(name, []), *filter(None, [shipped_version(name)])])
        raise NotFound(
            f"there is no version {version} of the program {name}; there are {', '.join(versions)}"
        )
    raise NotFound(unknown("program", label, {*shipped, *installed}))


def _is_path(name: str) -> bool:
    """'./mine', 'dir/mine' and 'mine.py' are paths; 'mine' is one only where no program is called so."""
    return "/" in name or name in {".", ".."} or name.endswith((".py", COMPONENT_SUFFIX, SUFFIX))


def _named(label: str, store: ProgramStore) -> ProgramSource | None:
    """What is installed goes before what is shipped: somebody wanted it here."""
    name, version = split_label(label)
    installed = store.find(name, version)
    if installed is not None:
        return store.open(installed)
    if version in (None, shipped_version(name)) and name in shipped_programs():
        return read_folder(shipped_programs()[name])
    return None


def _read_path(path: Path) -> ProgramSource:
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ProgramError(f"{path}: no such file or folder")
    if path.suffix == COMPONENT_SUFFIX:
        return ComponentProgram(path.stem, path)
    if path.suffix == ".py":
        return PythonProgram(path.stem, ((path.name, read_source(path)),), path.name)
    if path.suffix == SUFFIX:
        return _read_artifact(path)
    raise ProgramError(
        f"{path}: a program is a .py file, a folder with {ENTRY} or {FILE}, or a {COMPONENT_SUFFIX} component"
    )


def _read_artifact(path: Path) -> PythonProgram:
    artifact = unpack(path.read_bytes(), str(path))
    if artifact.component is not None:
        raise ProgramError(f"{path} holds a component, which runs from the store: pie install {path}")
    manifest = artifact.manifest
    return PythonProgram(manifest.name, artifact.sources, manifest.package.entry, manifest)


def _not_found(name: str, store: ProgramStore) -> str:
    plain, _, version = name.partition("@")
    shipped, installed = shipped_programs(), store.versions()
    if version and plain in installed:
        return store.not_installed(plain, version)
    guess = nearest(plain, [*shipped, *installed])
    hint = f"; did you mean {guess!r}?" if guess else ""
    others = f" or installed {', '.join(installed)}" if installed else ""
    return f"no program {name!r}: neither a file or folder nor one of the shipped {', '.join(shipped)}{others}{hint}"
