"""What every test may rely on: GPU tests run only where there is one, and whole suites count as slow.

And no test answers for what others do: what a module leaves behind is collected at its end, and how long hypothesis
takes to make an example on a busy machine is not judged.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

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

settings.register_profile(
    "pie", settings.default, deadline=None, suppress_health_check=(HealthCheck.too_slow,)
)
settings.load_profile("pie")

_HERE = Path(__file__).parent


def pytest_configure() -> None:
    """What tests start and interrupt hears of it behind a script's `&` too, for which shells have SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = Path("/dev/nvidia0").exists()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if _HERE in item.path.parents and _is_thorough(item.path.relative_to(_HERE).as_posix()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What lives now does so until the end: collections need not look at it again, so one takes milliseconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def garbage_is_charged_to_its_module() -> Iterator[None]:
    """A finalizer that fails is an error of the test that runs meanwhile, so it had better be one of this module."""
    thresholds = gc.get_threshold()
    yield
    assert gc.get_threshold() == thresholds, (
        "a test has changed when garbage is collected, see processes.garbage"
    )
    gc.collect()


def _is_thorough(path: str) -> bool:
    return path.startswith(THOROUGH) and path not in QUICK_AFTER_ALL
