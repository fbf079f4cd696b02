"""Scenarios with real guests: a runtime whose host API is the real poll and logging, and stand-ins for the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pie_core.host_api import logging as host_logging
from pie_core.host_api import poll
from pie_core.sandbox.hosting import Interface
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from pie_core.sandbox.signatures import our_interfaces

IMAGES: list[Path] = []  # the folder that keeps compiled images between test runs; conftest puts it here

Scenario = Callable[[Runtime], Awaitable[Any]]


class State:
    """What the guest printed, and how often it was closed."""

    def __init__(self, name: str = "guest") -> None:
        self.name = name
        self.tenant = "tenant"
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.closed = 0

    def write_stdout(self, data: bytes) -> None:
        self.stdout += data

    def write_stderr(self, data: bytes) -> None:
        self.stderr += data

    def close(self) -> None:
        self.closed += 1


def stand_in(name: str) -> Interface:
    """An interface of pie_core/wit whose functions refuse to be called."""
    interface = Interface(name)

    def never(guest: object, *arguments: object) -> None:
        raise AssertionError(f"a test called {name}, for which it has only a stand-in")

    for function in our_interfaces()[f"inferlet:api/{name}"].functions.values():
        interface.function(function.name)(never)
    return interface


def interfaces(*own: Interface) -> list[Interface]:
    """`own` and the real poll and logging; stand-ins for the rest."""
    given = {interface.name: interface for interface in (poll.interface, host_logging.interface, *own)}
    names = [path.partition("/")[2] for path in our_interfaces()]
    return [given.get(name) or stand_in(name) for name in names]


def drive(scenario: Scenario, *own: Interface, cache: Path | None = None, **options: Any) -> Any:
    """Runs a scenario in a runtime of its own; nothing may be left of its guests."""
    kept = cache or next(iter(IMAGES), None)

    async def main() -> Any:
        runtime = Runtime(interfaces(*own), kept, **options)
        try:
            result = await scenario(runtime)
            assert runtime.live_guests == 0
            return result
        finally:
            runtime.close()

    return asyncio.run(main())


async def call(program: Program, given: str = "", state: State | None = None, **limits: Any) -> Any:
    """Starts a guest, calls `run` and closes it."""
    async with program.start(state or State(), Limits(**limits)) as guest:
        return await guest.call("run", given)
