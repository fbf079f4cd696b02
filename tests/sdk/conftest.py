"""The SDK's tests run natively: the SDK's folder is importable and the host is `fake_host`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "sdk" / "python")) if path not in sys.path]

from tests.sdk import fake_host  # noqa: E402 - the paths above come first

fake_host.install()

from inferlet import return_value  # noqa: E402 - it imports the host


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> fake_host.World:
    """A fresh fake host, and no return value from an earlier test."""
    monkeypatch.setattr(return_value, "_value", None)
    return fake_host.reset()
