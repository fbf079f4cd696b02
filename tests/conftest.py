"""What every test may rely on: GPU tests run only where there is one, and whole suites count as slow."""

from __future__ import annotations

from pathlib import Path

import pytest

# Many quick tests that take minutes together, or start processes: `scripts/test fast` leaves them out.
THOROUGH = (
    "benchmarks",
    "contract",
    "core/cli/test_checkpoint.py",
    "core/cli/test_run.py",
    "core/engine/test_same_tokens.py",
    "core/models",
    "core/processes",
    "core/server",
    "core/testing",
    "flow",
    "packaging",
    "plugins",
)
QUICK_AFTER_ALL = ("flow/test_programs.py",)  # the way through the front door stays

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = Path("/dev/nvidia0").exists()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if _HERE in item.path.parents and _is_thorough(item.path.relative_to(_HERE).as_posix()):
            item.add_marker(pytest.mark.slow)


def _is_thorough(path: str) -> bool:
    return path.startswith(THOROUGH) and path not in QUICK_AFTER_ALL
