"""The wheel, built once for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.rules.source_tree import ROOT


def call(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Runs to the end and returns what went to stdout; a failure shows both streams."""
    run = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{command} exited {run.returncode}\n{run.stdout}\n{run.stderr}"
    return run.stdout


def build_wheel(source: Path, target: Path) -> Path:
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    call([sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", str(target), str(source)], cwd=target)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))
