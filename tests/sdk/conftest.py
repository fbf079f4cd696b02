"""The SDK's tests run natively: the SDK's folder is importable and the host is `fake_host`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "sdk" / "python")) if path not in sys.path]

from tests.sdk import fake_host  # noqa: E402 - the paths above come first

fake_host.install()


@pytest.fixture(autouse=True)
def world() -> fake_host.World:
    """A fresh fake host."""
    return fake_host.reset()
