"""The installed programs of this machine, by name and version, safe to use from several processes at once.

programs/
├── records/NAME/VERSION.json     what is installed: the manifest, and the hash of the content
├── objects/HASH.inferlet|.wasm   content, named by its blake3 hash, never changed
└── lock                          held while something is added or removed

A record appears and disappears whole, and after its object: whoever reads needs no lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from pie_core.errors import NotFound, ProgramError
from pie_core.manifest import (
    FILE,
    NAME_PATTERN,
    VERSION_PATTERN,
    Manifest,
    parse_manifest,
    require_version,
    version_key,
)
from pie_core.naming import unknown
from pie_core.paths import installed_programs_dir, make_private_dir
from pie_core.program_artifact import (
    COMPONENT_SUFFIX,
    SUFFIX,
    ComponentProgram,
    ProgramSource,
    PythonProgram,
    is_artifact,
    pack_folder,
    require_component,
    unpack,
)

_RECORD_KEYS = {"manifest", "content", "object", "size"}
_OBJECT = re.compile(r"[0-9a-f]{64}\.(inferlet|wasm)")


@dataclass(frozen=True, slots=True)
class InstalledProgram:
    """One version of one program. `content_hash` is of what was installed: an artifact, or a component's bytes."""

    name: str
    version: str
    manifest: Manifest
    content_hash: str
    path: Path  # the object that holds it
    size: int

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def manifest_hash(self) -> str:
        return content_hash(self.manifest.text.encode())


@dataclass(frozen=True, slots=True)
class DamagedProgram:
    """A record that cannot be used."""

    name: str
    version: str
    problem: str


def content_hash(content: bytes) -> str:
    """The blake3 hash in hexadecimal digits: the one that clients send with an upload."""
    return blake3(content).hexdigest()


class ProgramStore:
    """Owns one folder of programs. Everything raises ProgramError where files are not as they should be."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or installed_programs_dir()
        self._records = self._folder / "records"
        self._objects = self._folder / "objects"

    def add(self, path: Path, overwrite: bool = False) -> InstalledProgram:
        """Installs a folder with a manifest, or an artifact."""
        if path.is_dir():
            _, content = pack_folder(path)
        elif path.is_file():
            content = _read(path)
        else:
            raise ProgramError(
                f"{path}: no such file or folder; expected a folder with {FILE}, or a {SUFFIX} file"
            )
        if not is_artifact(content):
            raise ProgramError(
                f"{path}: expected a {SUFFIX} file; `pie build FOLDER` makes one of a folder with {FILE}"
            )
        return self.add_content(content, source=str(path), overwrite=overwrite)

    def add_content(
        self,
        content: bytes,
        manifest: str | None = None,
        *,
        expected_hash: str | None = None,
        overwrite: bool = False,
        source: str = "the program",
    ) -> InstalledProgram:
        """Installs bytes: an artifact, which brings its manifest, or a component with the manifest beside it.

        The same content again changes nothing; other content for an installed version is refused unless `overwrite`.
        """
        seen = content_hash(content)
        if expected_hash is not None and expected_hash.lower() != seen:
            raise ProgramError(
                f"{source}: its blake3 hash is {seen}, but {expected_hash} was announced; send it again"
            )
        parsed, suffix, stored = _opened(content, manifest, source)
        record = {
            "manifest": parsed.text,
            "content": seen,
            "object": content_hash(stored) + suffix,
            "size": len(content),
        }
        with self._locked():
            self._require_free(parsed, record, overwrite)
            _write_atomically(self._objects / str(record["object"]), stored)
            _write_atomically(self._record_path(parsed.name, parsed.version), json.dumps(record).encode())
            self._drop_unused_objects()
        return InstalledProgram(
            parsed.name, parsed.version, parsed, seen, self._objects / str(record["object"]), len(content)
        )

    def remove(self, name: str, version: str | None = None) -> list[str]:
        """Uninstalls one version, or all of them; returns which. Raises NotFound."""
        with self._locked():
            versions = [version] if version is not None else list(self._version_names(name))
            paths = [self._record_path(name, each) for each in versions]
            if not paths or not all(path.is_file() for path in paths):
                raise NotFound(self.not_installed(name, version))
            for path in paths:
                path.unlink()
            with suppress(OSError):  # other versions are left in it
                (self._records / name).rmdir()
            self._drop_unused_objects()
        return versions

    def installed(self) -> list[InstalledProgram]:
        """Every version of every program that can be used."""
        return [entry for entry in self.entries() if isinstance(entry, InstalledProgram)]

    def versions(self) -> dict[str, list[str]]:
        """The names of what is there, each with its versions, the newest last."""
        return {name: list(self._version_names(name)) for name in self._names()}

    def entries(self) -> list[InstalledProgram | DamagedProgram]:
        """Everything that is there, damaged or not, by name and then by version, the newest last."""
        found: list[InstalledProgram | DamagedProgram] = []
        for name, versions in self.versions().items():
            for version in versions:
                try:
                    found.append(self._read_record(name, version))
                except FileNotFoundError:
                    continue  # uninstalled since its name was read
                except ProgramError as error:
                    found.append(DamagedProgram(name, version, str(error)))
        return found

    def find(self, name: str, version: str | None = None) -> InstalledProgram | None:
        """That version, or the newest; None where it is not installed."""
        if not re.match(NAME_PATTERN, name):
            return None
        if version is None:
            versions = list(self._version_names(name))
            if not versions:
                return None
            version = versions[-1]
        try:
            return self._read_record(name, require_version(version))
        except FileNotFoundError:
            return None

    def open(self, program: InstalledProgram) -> ProgramSource:
        """What the sandbox runs, read now and compared with its hash."""
        try:
            content = self._object(program)
        except FileNotFoundError:
            return self._reopened(program)
        if program.path.suffix == COMPONENT_SUFFIX:
            return ComponentProgram(program.name, program.path, program.manifest)
        artifact = unpack(content, str(program.path))
        return PythonProgram(program.name, artifact.sources, program.manifest.package.entry, program.manifest)

    def _reopened(self, program: InstalledProgram) -> ProgramSource:
        """Its content is gone: it was replaced or uninstalled since it was found, or somebody else took the file."""
        now = self.find(program.name, program.version)
        if now is None:
            raise NotFound(self.not_installed(program.name, program.version))
        if now.path == program.path:
            raise ProgramError(_damaged(program.label, f"{program.path} is missing"))
        return self.open(now)

    def not_installed(self, name: str, version: str | None = None) -> str:
        """The sentence that says so, with what is installed instead."""
        versions = list(self._version_names(name)) if re.match(NAME_PATTERN, name) else []
        if versions:
            return f"{name}@{version} is not installed; installed are the versions {', '.join(versions)}"
        return unknown("installed program", name, self._names())

    def _object(self, program: InstalledProgram) -> bytes:
        try:
            content = program.path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ProgramError(_damaged(program.label, f"{program.path}: {error.strerror}")) from None
        if content_hash(content) != program.path.stem:
            raise ProgramError(_damaged(program.label, f"{program.path} is not what was installed"))
        return content

    def _names(self) -> list[str]:
        named = [folder.name for folder in _listing(self._records) if re.match(NAME_PATTERN, folder.name)]
        return [name for name in named if any(self._version_names(name))]

    def _version_names(self, name: str) -> Iterator[str]:
        """In order, the newest last."""
        files = _listing(self._records / name)
        versions = [
            file.stem for file in files if file.suffix == ".json" and re.match(VERSION_PATTERN, file.stem)
        ]
        yield from sorted(versions, key=version_key)

    def _record_path(self, name: str, version: str) -> Path:
        if not re.match(NAME_PATTERN, name):
            raise NotFound(self.not_installed(name))
        return self._records / name / f"{require_version(version)}.json"

    def _read_record(self, name: str, version: str) -> InstalledProgram:
        path = self._record_path(name, version)
        label = f"{name}@{version}"
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise ProgramError(_damaged(label, f"{path} cannot be read: {error}")) from None
        if not _is_record(record):
            raise ProgramError(_damaged(label, f"{path} lacks one of {', '.join(sorted(_RECORD_KEYS))}"))
        try:
            manifest = parse_manifest(record["manifest"], f"{path}: {FILE}")
        except ProgramError as error:
            raise ProgramError(_damaged(label, str(error))) from None
        if manifest.label != label:
            raise ProgramError(_damaged(label, f"{path} is about {manifest.label}"))
        return InstalledProgram(
            name, version, manifest, record["content"], self._objects / record["object"], record["size"]
        )

    def _require_free(self, manifest: Manifest, record: dict[str, object], overwrite: bool) -> None:
        """A damaged record is no reason to refuse what mends it."""
        try:
            present = self.find(manifest.name, manifest.version)
        except ProgramError:
            return
        same = present is None or (present.content_hash, present.manifest.text) == (
            record["content"],
            manifest.text,
        )
        if not same and not overwrite:
            raise ProgramError(
                f"{manifest.label} is installed with other content; raise `version` in {FILE}, or overwrite it"
            )

    def _drop_unused_objects(self) -> None:
        """Keeps everything while a record cannot be read: it might be the only one that names an object."""
        entries = self.entries()
        if any(isinstance(entry, DamagedProgram) for entry in entries):
            return
        used = {entry.path.name for entry in entries if isinstance(entry, InstalledProgram)}
        for path in _listing(self._objects):
            if path.name not in used:
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        make_private_dir(self._folder)
        with (self._folder / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            yield


def split_label(label: str) -> tuple[str, str | None]:
    """'text@1.0.0' -> ('text', '1.0.0'), 'text' -> ('text', None). Raises ProgramError for a version that is none."""
    name, at, version = label.partition("@")
    return name, require_version(version) if at else None


def _opened(content: bytes, manifest: str | None, source: str) -> tuple[Manifest, str, bytes]:
    """The manifest, and what to keep: of an artifact with a component only that, because it runs from its file."""
    if is_artifact(content):
        artifact = unpack(content, source)
        if manifest is not None and manifest != artifact.manifest.text:
            raise ProgramError(f"{source}: the manifest beside it is not the one in it; leave it out")
        if artifact.component is None:
            return artifact.manifest, SUFFIX, content
        require_component(artifact.component, f"{source}: {artifact.manifest.package.entry}")
        return artifact.manifest, COMPONENT_SUFFIX, artifact.component
    if manifest is None:
        raise ProgramError(f"{source}: expected a manifest beside a component")
    require_component(content, source)
    return parse_manifest(manifest, f"{source}: {FILE}"), COMPONENT_SUFFIX, content


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or record.keys() != _RECORD_KEYS:
        return False
    texts = all(isinstance(record[key], str) for key in ("manifest", "content", "object"))
    return texts and isinstance(record["size"], int) and _OBJECT.fullmatch(record["object"]) is not None


def _damaged(label: str, problem: str) -> str:
    return (
        f"the installed program {label} is damaged: {problem}; `pie uninstall {label}`, then install it again"
    )


def _listing(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read: {error.strerror}") from None


def _write_atomically(path: Path, content: bytes) -> None:
    """The file is there whole or not at all, also if the machine stops."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ProgramError(f"{path} cannot be written: {error.strerror}") from None
