"""The generic Python guest as a file: made of `sdk/python` and the WIT by componentize-py, rebuilt when they change.

The stamp beside the component holds a digest of the sources that it was made of, and the compiler's version. On a
machine without the compiler a component of these very sources is as good as ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pie_core.errors import ProgramError

FOLDER = Path(__file__).parent
ARTIFACT = FOLDER / "python.wasm"
STAMP = FOLDER / "python.json"
WIT = FOLDER.parent / "wit"
SDK = FOLDER.parents[1] / "sdk" / "python"  # only in a source checkout

WORLD = "script-runtime"
APPLICATION = "inferlet_guest.app"
PACKAGES = ("inferlet", "inferlet_guest")
COMPILER = "componentize-py"
COMPILER_COMMAND = (sys.executable, "-c", "import componentize_py; componentize_py.script()")

Progress = Callable[[str], None]


def print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def is_buildable() -> bool:
    """True in a source checkout."""
    return (SDK / APPLICATION.partition(".")[0]).is_dir()


def build_if_stale(progress: Progress = print_progress) -> Path:
    """The component, built first if its sources changed since. Raises ProgramError when that fails."""
    if not is_fresh():
        with _locked():
            if not is_fresh():  # another process may have built it meanwhile
                _build(progress)
    return ARTIFACT


def is_fresh() -> bool:
    """Made of the sources as they are, by the compiler that is installed, if one is."""
    try:
        stamp = json.loads(STAMP.read_text())
        compiler = _installed_compiler() or stamp[COMPILER]
        wanted = {"sources": digest(), "size": ARTIFACT.stat().st_size, COMPILER: compiler}
        return bool(stamp == wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def digest() -> str:
    """Of every source file."""
    total = hashlib.sha256()
    for path in _sources():
        content = path.read_bytes()
        total.update(f"\n{path.name} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()


def _sources() -> list[Path]:
    python = [path for package in PACKAGES for path in sorted((SDK / package).rglob("*.py"))]
    return sorted(WIT.glob("*.wit")) + python


def _installed_compiler() -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(COMPILER)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build(progress: Progress) -> None:
    sources, compiler = digest(), _installed_compiler()  # of what is compiled, should it change meanwhile
    if compiler is None:
        raise ProgramError(
            f"{COMPILER} is not installed, and the generic Python guest is built with it, for {ARTIFACT} is missing or "
            "made of other sources: `pip install 'pie-core[build]'`, or run scripts/install"
        )
    progress("building the Python guest (once, about ten seconds) …")
    started = time.monotonic()
    made = ARTIFACT.with_suffix(f".{os.getpid()}.part")
    try:
        _compile(made)
        size = made.stat().st_size
        STAMP.unlink(missing_ok=True)
        made.replace(ARTIFACT)
        STAMP.write_text(json.dumps({"sources": sources, "size": size, COMPILER: compiler}) + "\n")
    except OSError as error:
        raise ProgramError(f"the Python guest cannot be written to {FOLDER}: {error.strerror}") from error
    finally:
        made.unlink(missing_ok=True)
    progress(f"built the Python guest: {size / 1e6:.0f} MB in {time.monotonic() - started:.0f} s")


def _compile(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _copy_packages(Path(folder))
        options = ["--quiet", "--wit-path", str(WIT), "--world", WORLD, "componentize"]
        command = [*COMPILER_COMMAND, *options, "--python-path", folder, APPLICATION, "--output", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ProgramError(
            f"{COMPILER} {_installed_compiler()} could not build the Python guest (exit status "
            f"{result.returncode}):\n{result.stdout}{result.stderr}".rstrip()
        )


def _copy_packages(target: Path) -> None:
    """The compiler's own Python would leave byte code in the sources' folders, and trust what it finds there."""
    for package in PACKAGES:
        shutil.copytree(SDK / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One build at a time in this checkout."""
    folder = os.open(FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
