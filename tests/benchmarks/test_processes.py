"""The benchmark of engine processes runs to its end; how large its figures are is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import processes

pytestmark = pytest.mark.slow


def test_rounds_are_measured_here_and_there_and_losses_are_made_good(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    processes.main(["--quick", "--json", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [(row["what"], row["contexts"]) for row in found["steps"]] == [
        ("status", 0),
        ("passes", 1),
        ("steps", 1),
        ("passes", 8),
        ("steps", 8),
    ]
    assert all(row["here_us"] > 0 and row["front_us"] > 0 and row["engine_us"] > 0 for row in found["steps"])
    assert [row["signal"] for row in found["losses"]] == ["SIGKILL", "SIGSTOP"]
    assert all(0 < row["known_ms"] <= row["ready_again_ms"] for row in found["losses"])
