"""The generic Python guest runs on our own WASI, and its misbehaviour stays its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pie_core.errors import DeadlineExceeded, GuestError, LimitExceeded
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from pie_core.sandbox.wasi.streams import ByteSource
from tests.core.sandbox.scenarios import State, drive

pytestmark = pytest.mark.slow

RunSource = Callable[..., Awaitable[Any]]


def with_python(guest: Path, scenario: Callable[[RunSource], Awaitable[None]]) -> None:
    """Gives the scenario a function that runs the source of an inferlet."""

    async def whole(runtime: Runtime) -> None:
        program = await Program.load(runtime, guest)
        assert program.world == "script-runtime"

        async def run_source(
            source: str,
            given: Any = None,
            state: State | None = None,
            stdin: ByteSource | None = None,
            **limits: Any,
        ) -> Any:
            async with program.start(state or State(), Limits(**limits), stdin) as guest:
                await guest.call("load", [("main.py", source)], "main.py")
                result = await guest.call("run", json.dumps(given))
                return None if result is None else json.loads(result)

        await scenario(run_source)

    drive(whole)


def test_a_program_from_source_computes_prints_and_reads(python_guest: Path) -> None:
    source = """
import random, sys, time
async def main(given):
    print("to the user")
    print("to the log", file=sys.stderr)
    return [given, sys.stdin.read(), time.time() > 1.7e9, time.monotonic() > 0, 0 <= random.random() < 1]
"""

    async def scenario(run_source: RunSource) -> None:
        state, stdin = State(), ByteSource()
        task = asyncio.ensure_future(run_source(source, {"n": 1}, state, stdin))
        await asyncio.sleep(0.05)
        assert not task.done()  # it waits for its standard input
        stdin.feed(b"two ")
        stdin.feed(b"words")
        stdin.end()
        assert await task == [{"n": 1}, "two words", True, True, True]
        assert state.stdout == b"to the user\n"
        assert state.stderr == b"to the log\n"

    with_python(python_guest, scenario)


def test_time_sleep_holds_nobody_back(python_guest: Path) -> None:
    async def scenario(run_source: RunSource) -> None:
        sleep = asyncio.ensure_future(run_source("import time\nasync def main(given): time.sleep(3600)"))
        answers = await asyncio.gather(
            *(run_source("async def main(given): return given", n) for n in range(10))
        )
        assert answers == list(range(10))
        sleep.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleep

    with_python(python_guest, scenario)


@pytest.mark.parametrize(
    ("body", "limits", "error", "says"),
    [
        ("raise ValueError('of the guest')", {}, GuestError, "ValueError: of the guest"),
        ("while True: pass", {"cpu_seconds_per_resume": 0.2}, DeadlineExceeded, "CPU time"),
        ("f = lambda: f() + 1; f()", {}, GuestError, "RecursionError"),
        (
            "held = []\n    while True: held.append(bytearray(10_000_000))",
            {"memory_bytes": 128 << 20},
            GuestError,
            "MemoryError|was stopped",
        ),
        (
            "while True: print('x' * 10_000)",
            {"output_bytes": 1 << 20},
            LimitExceeded,
            "output_bytes = 1048576",
        ),
        ("open('/etc/passwd')", {}, GuestError, "FileNotFoundError|PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", {}, GuestError, "Error"),
    ],
)
def test_a_program_that_misbehaves_ends_with_its_own_error(
    python_guest: Path,
    body: str,
    limits: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    async def scenario(run_source: RunSource) -> None:
        state = State()
        with pytest.raises(error, match=says):
            await run_source(f"async def main(given):\n    {body}", None, state, **limits)
        assert state.closed == 1
        assert len(state.stdout) <= limits.get("output_bytes", 0)

    with_python(python_guest, scenario)
