"""The folder of models on this machine: PIE_HOME/models, one entry a model.

default/      SmolLM2-135M-Instruct.Q4_1.gguf, fetched.json      (fetch.py)
my-qwen/      a copy of a Hugging Face folder, or a link to one
my-llama/     one .gguf file, or a link to one
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pie_core.config import DEFAULT_MODEL
from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.errors import FetchError, LoadError
from pie_core.models.hub import PATTERNS
from pie_core.naming import unknown
from pie_core.paths import models_dir

PARTIAL = ".partial-"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_GGUF_MAGIC = b"GGUF"
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class StoredModel:
    name: str
    path: Path  # a folder or a .gguf file
    size_bytes: int
    linked: bool


def stored_models() -> list[StoredModel]:
    """What is in the store and complete, by name."""
    if not models_dir().is_dir():
        return []
    entries = [entry for entry in sorted(models_dir().iterdir()) if not entry.name.startswith(".")]
    return [_stored(entry) for entry in entries if _checkpoint_in(entry) is not None]


def stored_model(name: str) -> Path:
    """The path of a model of the store. Raises LoadError that names the nearest one."""
    path = _checkpoint_in(models_dir() / name) if _NAME.fullmatch(name) else None
    if path is None:
        known = {DEFAULT_MODEL, *(model.name for model in stored_models())}
        raise LoadError(
            f"{unknown('model', name, known)}; give it a `path` or `repo`, or import it: `pie model import PATH`"
        )
    return path


def import_model(source: Path, name: str | None, link: bool, progress: ProgressCallback) -> StoredModel:
    """Copies or links a Hugging Face folder or a GGUF file into the store."""
    source = source.expanduser().absolute()
    files = _files_of(source)
    chosen = _checked_name(name or source.stem if source.is_file() else name or source.name)
    with scratch_dir(models_dir()) as scratch:
        entry = scratch / chosen
        if link:
            _link(source, entry)
        else:
            _copy(files, entry, progress)
        entry.rename(models_dir() / chosen)
    return _stored(models_dir() / chosen)


@contextmanager
def scratch_dir(parent: Path) -> Iterator[Path]:
    """A folder inside the store for what is not complete yet; it is gone afterwards."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=parent) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise disk_problem(parent, error) from error


def disk_problem(folder: Path, error: OSError) -> FetchError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FetchError(
            f"the disk of {folder} is full; free some space, or set PIE_HOME to a folder on another disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return FetchError(
            f"cannot write to {folder}: {error.strerror}; set PIE_HOME to a folder you can write to"
        )
    return FetchError(f"cannot store the model in {folder}: {error}")


def _checkpoint_in(entry: Path) -> Path | None:
    """The folder itself if it holds a configuration, or its one GGUF file."""
    if (entry / "config.json").is_file():
        return entry.resolve()
    files = [file for file in sorted(entry.glob("*.gguf")) if file.is_file()]
    return files[0].resolve() if len(files) == 1 else None


def _stored(entry: Path) -> StoredModel:
    path = _checkpoint_in(entry)
    assert path is not None, f"{entry} was complete a moment ago"
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    linked = entry.is_symlink() or any(file.is_symlink() for file in entry.glob("*.gguf"))
    return StoredModel(entry.name, path, sum(file.stat().st_size for file in files), linked)


def _files_of(source: Path) -> list[Path]:
    """The files that make up the model. Raises LoadError when it is none."""
    if source.is_dir():
        return _files_of_folder(source)
    if not source.is_file():
        raise LoadError(f"{source} does not exist; expected a Hugging Face folder or a GGUF file")
    with source.open("rb") as stream:
        magic = stream.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise LoadError(f"{source} is no GGUF file: it begins with {magic!r}, expected {_GGUF_MAGIC!r}")
    return [source]


def _files_of_folder(source: Path) -> list[Path]:
    files = [file for file in sorted(source.iterdir()) if file.is_file() and _belongs(file.name)]
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise LoadError(
            f"{source} is no Hugging Face model: expected `config.json` and `*.safetensors` in it, "
            f"found {', '.join(sorted(names)) or 'neither'}; a GGUF file is imported by its own path"
        )
    return files


def _belongs(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise LoadError(
            f"`{name}` cannot name a model: use letters, digits, `.`, `_` and `-`, or choose one with --name"
        )
    if name == DEFAULT_MODEL:
        raise LoadError(f"the name `{name}` is kept for the default model; choose another one with --name")
    if (models_dir() / name).exists() or (models_dir() / name).is_symlink():
        raise LoadError(
            f"a model `{name}` is in the store already ({models_dir() / name}); remove it, or choose --name"
        )
    return name


def _link(source: Path, entry: Path) -> None:
    if source.is_dir():
        entry.symlink_to(source, target_is_directory=True)
        return
    entry.mkdir()
    (entry / source.name).with_suffix(".gguf").symlink_to(source)


def _copy(files: list[Path], entry: Path, progress: ProgressCallback) -> None:
    entry.mkdir()
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        name = f"{file.stem}.gguf" if len(files) == 1 else file.name
        with file.open("rb") as reader, (entry / name).open("wb") as writer:
            while chunk := reader.read(_CHUNK):
                writer.write(chunk)
                done += len(chunk)
                progress(Progress("copying the model", done, total))


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
