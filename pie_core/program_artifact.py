"""A program as files: a folder, or the one artifact that `pie build` makes of it.

An artifact (`NAME-VERSION.inferlet`) is a zip archive without compression, with fixed times and sorted names, so that
the same folder gives the same bytes anywhere. It holds `Pie.toml` and either the Python sources or one component.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pie_core.errors import ProgramError
from pie_core.manifest import ENTRY, FILE, Manifest, parse_manifest, read_manifest

SUFFIX = ".inferlet"
COMPONENT_SUFFIX = ".wasm"
MAX_SOURCE_BYTES = 16 << 20
MAX_COMPONENT_BYTES = 256 << 20
MAX_FILES = 10_000
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "tests"}

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold
_MODE = 0o100644 << 16
# What `zipfile` raises on damaged files, by accident for the most part.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    EOFError,
    OSError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class PythonProgram:
    """Source text that the generic Python guest runs."""

    name: str
    files: tuple[tuple[str, str], ...]  # (path inside the program, text)
    entry: str
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class ComponentProgram:
    """A WebAssembly component that exports `run` itself."""

    name: str
    path: Path
    manifest: Manifest | None = None


ProgramSource = PythonProgram | ComponentProgram


@dataclass(frozen=True, slots=True)
class Artifact:
    """What an artifact holds: the sources, or the component."""

    manifest: Manifest
    sources: tuple[tuple[str, str], ...] = ()
    component: bytes | None = None


def read_folder(folder: Path) -> ProgramSource:
    """A folder with a manifest, or with nothing but Python sources. Raises ProgramError."""
    manifest = read_manifest(folder / FILE) if (folder / FILE).is_file() else None
    name = folder.resolve().name if manifest is None else manifest.name
    entry = ENTRY if manifest is None else manifest.package.entry
    path = folder / _safe_entry(entry, folder)
    if not path.is_file():
        raise ProgramError(_no_entry(folder, entry, manifest))
    if path.suffix == COMPONENT_SUFFIX:
        return ComponentProgram(name, path, manifest)
    return PythonProgram(name, _sources(folder), entry, manifest)


def read_source(path: Path) -> str:
    """One source file's text. Raises ProgramError."""
    try:
        size = path.stat().st_size
        if size > MAX_SOURCE_BYTES:
            raise ProgramError(f"{path}: {size:,} bytes; at most {MAX_SOURCE_BYTES:,} of source are taken")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProgramError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read: {error.strerror}") from None


def pack_folder(folder: Path) -> tuple[Manifest, bytes]:
    """What `pie build` writes. Raises ProgramError."""
    if not folder.is_dir():
        raise ProgramError(f"{folder}: expected a folder with {FILE} and the program")
    program = read_folder(folder)
    if program.manifest is None:
        raise ProgramError(
            f"{folder} has no {FILE}: write one with [package], name and version; `pie new` makes an example"
        )
    if isinstance(program, ComponentProgram):
        files = {program.manifest.package.entry: _component_bytes(program.path)}
    else:
        files = {path: text.encode() for path, text in program.files}
    return program.manifest, pack({FILE: program.manifest.text.encode(), **files})


def pack(files: Mapping[str, bytes]) -> bytes:
    """The archive with these files; the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = _MODE
            info.create_system = 3  # Unix, whatever this machine is
            archive.writestr(info, files[name])
    return buffer.getvalue()


def is_artifact(content: bytes) -> bool:
    return content.startswith(b"PK")


def unpack(content: bytes, source: str) -> Artifact:
    """Reads an artifact, which may come from anyone. Raises ProgramError that begins with `source`."""
    try:
        files = _unpacked(content, source)
    except _ZIP_ERRORS as error:
        raise ProgramError(f"{source}: not an artifact of `pie build`, or damaged: {error}") from None
    if FILE not in files:
        raise ProgramError(
            f"{source}: expected {FILE} in it; found {', '.join(sorted(files)[:5]) or 'nothing'}"
        )
    manifest = parse_manifest(_text(files.pop(FILE), FILE, source), f"{source}: {FILE}")
    entry = manifest.package.entry
    if entry not in files:
        raise ProgramError(f"{source}: its manifest names the entry {entry}, which is not in it")
    if entry.endswith(COMPONENT_SUFFIX):
        return Artifact(manifest, component=files[entry])
    return Artifact(
        manifest, tuple((name, _text(data, name, source)) for name, data in sorted(files.items()))
    )


def _unpacked(content: bytes, source: str) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if len(members) > MAX_FILES:
            raise ProgramError(f"{source}: {len(members):,} files in it; at most {MAX_FILES:,} are taken")
        files: dict[str, bytes] = {}
        for member in members:
            _require_member(member, source)
            if member.filename in files:
                raise ProgramError(f"{source}: {member.filename} is in it twice")
            files[member.filename] = archive.read(member)
        return files


def _require_member(member: zipfile.ZipInfo, source: str) -> None:
    """No compression also means no archive that grows when it is read."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ProgramError(
            f"{source}: {member.filename} is compressed or encrypted; `pie build` makes artifacts that are not"
        )
    if not is_safe_path(member.filename):
        raise ProgramError(f"{source}: {member.filename!r} is no path inside a program")


def is_safe_path(name: str) -> bool:
    """Whether it is a plain relative path that stays where it is unpacked."""
    path = PurePosixPath(name)
    usual = bool(path.parts) and name == path.as_posix() and name.isprintable() and "\\" not in name
    return usual and not path.is_absolute() and not {".", "..", ""} & set(path.parts)


def _safe_entry(entry: str, folder: Path) -> str:
    if not is_safe_path(entry):
        raise ProgramError(f"{folder / FILE}: package.entry: {entry!r} is no path inside the program")
    if not entry.endswith((".py", COMPONENT_SUFFIX)):
        raise ProgramError(
            f"{folder / FILE}: package.entry: expected a .py or .wasm file, but found {entry!r}"
        )
    return entry


def _no_entry(folder: Path, entry: str, manifest: Manifest | None) -> str:
    for file, how in _BUILDS.items():
        if manifest is not None and (folder / file).is_file():
            return f"{folder}: its entry {entry} is not there; {how}, and name the component as `entry` in {FILE}"
    if manifest is not None:
        return f"{folder}: its manifest names the entry {entry}, which is not there"
    return f"{folder}: expected a file {ENTRY} with `async def main(input)`; try `pie new NAME`"


_BUILDS = {
    "Cargo.toml": "compile it with `cargo build --target wasm32-wasip2 --release`",
    "package.json": "compile it to a component",
}


def _sources(folder: Path) -> tuple[tuple[str, str], ...]:
    files = tuple((path.relative_to(folder).as_posix(), read_source(path)) for path in _source_paths(folder))
    total = sum(len(text) for _, text in files)
    if total > MAX_SOURCE_BYTES:
        raise ProgramError(
            f"{folder}: {total:,} characters of Python source; at most {MAX_SOURCE_BYTES:,} are taken"
        )
    return files


def _source_paths(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in SKIPPED_FOLDERS and not path.name.startswith("."):
            yield from _source_paths(path)
        elif path.suffix == ".py" and path.is_file():
            yield path


def _component_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_COMPONENT_BYTES:
        raise ProgramError(f"{path}: {size:,} bytes; at most {MAX_COMPONENT_BYTES:,} are taken")
    content = path.read_bytes()
    require_component(content, str(path))
    return content


def require_component(content: bytes, source: str) -> None:
    """Raises ProgramError unless the bytes begin as WebAssembly does; the sandbox looks closer when it compiles."""
    if not content.startswith(b"\0asm"):
        raise ProgramError(f"{source}: begins with {content[:8]!r}; expected a WebAssembly component")


def _text(data: bytes, name: str, source: str) -> str:
    if len(data) > MAX_SOURCE_BYTES:
        raise ProgramError(
            f"{source}: {name} has {len(data):,} bytes; at most {MAX_SOURCE_BYTES:,} are taken"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProgramError(f"{source}: {name} is not UTF-8 text at byte {error.start}") from None
