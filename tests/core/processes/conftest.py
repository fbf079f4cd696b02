"""What the tests of processes share: an installed plugin with a driver that goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def faulty_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a driver that processes started from here find among the installed plugins."""
    info = tmp_path / "pie_faulty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pie-faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pie.plugins]\nfaulty = tests.core.processes.faulty_driver\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "faulty"
