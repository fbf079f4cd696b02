"""The committed typings of the host's functions are what the WIT says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TYPINGS = ROOT / "sdk" / "python" / "typings"


@pytest.mark.slow
def test_the_typings_equal_the_bindings_of_the_wit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import componentize_py; componentize_py.script()"]
    options = ["-q", "-d", str(ROOT / "pie_core" / "wit"), "-w", "script-runtime", "bindings", str(tmp_path)]
    subprocess.run([*command, *options], check=True)
    committed = sorted(path.relative_to(TYPINGS) for path in TYPINGS.rglob("*.py"))
    assert [path for path in committed if path.parts[0] == "wit_world"] == sorted(
        path.relative_to(tmp_path) for path in (tmp_path / "wit_world").rglob("*.py")
    )
    for path in committed:
        assert (TYPINGS / path).read_text() == (tmp_path / path).read_text(), (
            f"{path}: copy it from the bindings"
        )
