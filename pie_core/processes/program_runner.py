"""Runs programs in the sandbox of this process: compiles each once, starts its guest, calls it, returns its value."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.guests import python_guest
from pie_core.host_api.guest_state import ProgramState
from pie_core.host_api.program_trace import ProgramTrace
from pie_core.processes.daemon_threads import in_daemon_thread
from pie_core.programs import ComponentProgram, ProgramSource, PythonProgram
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from pie_core.telemetry.tracing import Tracing, spanning

_KEPT_PROGRAMS = 256  # compiled and ready to start


class ProgramRunner:
    """All programs of one runtime."""

    def __init__(self, runtime: Runtime, progress: ProgressCallback, tracing: Tracing | None = None) -> None:
        self._runtime = runtime
        self._progress = progress
        self._tracing = tracing
        self._programs: dict[Path | None, asyncio.Task[Program]] = {}

    async def run(
        self, source: ProgramSource, inputs: str, limits: Limits, state: ProgramState
    ) -> str | None:
        """Runs a program to its end; JSON goes in and comes out. Raises GuestError or what the program let through."""
        with spanning(self._tracing, "load", state.traceparent):
            program = await self._program(source)
        with self._traced(state):
            return await _run(program, source, inputs, limits, state)

    @contextmanager
    def _traced(self, state: ProgramState) -> Iterator[None]:
        """The host calls of the program become spans below that of its guest, if they are recorded."""
        with spanning(self._tracing, "guest", state.traceparent, {"pie.process": state.process}) as span:
            if self._tracing is not None and span is not None and span.is_recorded:
                state.trace = ProgramTrace(self._tracing, span)
            yield

    async def prepare(self) -> None:
        """Loads the Python guest before the first program needs it."""
        await self._loaded(None, "the Python guest")

    async def close(self) -> None:
        """Gives up what is still being loaded."""
        for task in self._programs.values():
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    async def _program(self, source: ProgramSource) -> Program:
        if isinstance(source, ComponentProgram):
            return await self._loaded(source.path, source.name)
        return await self._loaded(None, "the Python guest")

    async def _loaded(self, path: Path | None, label: str) -> Program:
        """Of the component at `path`; None is the Python guest, whose file is looked for once only."""
        task = self._programs.get(path)
        if task is None or _has_failed(task):
            if len(self._programs) >= _KEPT_PROGRAMS:
                self._programs.pop(next(iter(self._programs)))  # running guests keep theirs
            task = self._programs[path] = asyncio.ensure_future(self._load(path, label))
            task.add_done_callback(_has_failed)
        return await asyncio.shield(task)  # several may wait for it: one that gives up ends no other

    async def _load(self, path: Path | None, label: str) -> Program:
        def report(what: str, seconds: float) -> None:
            self._progress(Progress(what, int(seconds), 0, "s"))

        file = path if path is not None else await in_daemon_thread(python_guest)
        return await Program.load(self._runtime, file, label, report)


async def _run(
    program: Program, source: ProgramSource, inputs: str, limits: Limits, state: ProgramState
) -> str | None:
    async with program.start(state, limits) as guest:
        if isinstance(source, PythonProgram):
            await guest.call("load", list(source.files), source.entry)
        returned: str | None = await guest.call("run", inputs)
    return returned


def _has_failed(task: asyncio.Task[Program]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
