"""Programs that programs launch: found, checked against limits, started, and asked for their result.

They are programs like others, of the user and tenant of the one that launched them, with its priority and at most its
limits. Who hosts them is `Launches.host`: the application itself, or a server, whose clients find them in its list.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from pie_core.config import RuntimeConfig
from pie_core.errors import Cancelled, LimitExceeded, PieError
from pie_core.host_api.guest_state import ClientLink, LaunchedProgram, ProgramState, Standing
from pie_core.ids import ProcessId, Tenant
from pie_core.manifest import parse_input
from pie_core.processes.daemon_threads import in_daemon_thread
from pie_core.programs import ProgramSource, find_installable
from pie_core.sandbox.hosting import Pending


class StartedProgram(Protocol):
    """A program that runs."""

    @property
    def process(self) -> ProcessId: ...

    async def result(self) -> str | None:
        """Its return value as JSON text, once it has ended. Raises the error that ended it."""
        ...

    def cancel(self) -> None: ...


class ProgramHost(Protocol):
    """Finds and starts programs for other programs."""

    async def find(self, program: str) -> ProgramSource:
        """By name or name@version, never by path. Raises NotFound."""
        ...

    def start(self, parent: ProgramState, program: str, source: ProgramSource, given: str) -> StartedProgram:
        """Raises RequestError or Unavailable."""
        ...


class Launches:
    """Satisfies `guest_state.Launcher`; counts what runs, whether it was detached or not."""

    def __init__(self, config: RuntimeConfig, host: ProgramHost) -> None:
        self.host = host
        self._config = config
        self._of_program: Counter[ProcessId] = Counter()
        self._of_tenant: Counter[Tenant] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._running: set[StartedProgram] = set()

    def launch(self, parent: ProgramState, program: str, given: str) -> Pending[LaunchedProgram]:
        self._check_room(parent)
        self._count(parent, 1)
        task = self._in_background(self._start(parent, program, given))
        launched: Pending[LaunchedProgram] = Pending(lambda: _give_up(task))
        task.add_done_callback(lambda _: _settle(launched, task))
        return launched

    async def close(self) -> None:
        """Ends all of them."""
        while self._tasks:
            for started in self._running:
                started.cancel()
            await asyncio.wait(self._tasks)

    async def _start(self, parent: ProgramState, program: str, given: str) -> LaunchedProgram:
        try:
            source = await self.host.find(program)
            started = self.host.start(parent, program, source, given)
        except BaseException:
            self._count(parent, -1)
            raise
        ended: Pending[str | None] = Pending()
        self._running.add(started)
        self._in_background(self._watch(parent, started, ended))
        return _Launched(started, ended)

    async def _watch(self, parent: ProgramState, started: StartedProgram, ended: Pending[str | None]) -> None:
        try:
            value = await started.result()
        except PieError as error:
            ended.fail(error)
        except Exception as error:  # ours, not the program's: whoever launched it is told that much
            ended.fail(PieError(f"the program could not be run: {type(error).__name__}: {error}"))
        else:
            ended.resolve(value)
        finally:
            self._running.discard(started)
            self._count(parent, -1)

    def _count(self, parent: ProgramState, change: int) -> None:
        self._of_program[parent.process] += change
        self._of_tenant[parent.tenant] += change
        if not self._of_program[parent.process]:
            del self._of_program[parent.process]

    def _check_room(self, parent: ProgramState) -> None:
        standing, config = parent.standing, self._config
        assert standing is not None, "only a program that runs launches others"
        if parent.depth >= config.children_depth:
            raise LimitExceeded(
                f"the program stands {parent.depth} launches deep, and no more may nest (runtime.children_depth)"
            )
        mine = self._of_program[parent.process]
        if mine >= standing.max_children:
            raise LimitExceeded(
                f"{mine} programs that this one launched are running; it may run {standing.max_children} at a time"
                f" ({standing.children_option})"
            )
        most, ours = config.children_per_tenant, self._of_tenant[parent.tenant]
        if most is not None and ours >= most:
            raise LimitExceeded(
                f"{ours} programs that programs of {parent.tenant!r} launched are running; {most} may"
                " (runtime.children_per_tenant)"
            )

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Launched:
    """A program as the one sees it that launched it."""

    def __init__(self, started: StartedProgram, ended: Pending[str | None]) -> None:
        self.process = started.process
        self.ended = ended
        self._started = started

    def cancel(self) -> None:
        self._started.cancel()

    def detach(self) -> None:
        """There is nothing to do: it has a task of its own."""


def _give_up(task: asyncio.Task[Any]) -> None:
    task.cancel()


def _settle(launched: Pending[LaunchedProgram], task: asyncio.Task[LaunchedProgram]) -> None:
    if task.cancelled():
        launched.fail(Cancelled("the launch was given up"))
    elif (error := task.exception()) is not None:
        launched.fail(error)
    else:
        launched.resolve(task.result())


# ---- without a server


class Application(Protocol):
    """What runs programs."""

    def new_process(
        self,
        username: str,
        client: ClientLink,
        tenant: Tenant | None = None,
        priority: int = 0,
        traceparent: str | None = None,
        parent: ProgramState | None = None,
    ) -> ProgramState: ...

    def launch_terms(
        self, source: ProgramSource, arguments: Mapping[str, Any], inherited: Standing | None = None
    ) -> tuple[Mapping[str, Any], Standing]: ...

    async def run(self, source: ProgramSource, arguments: Mapping[str, Any], state: ProgramState) -> Any: ...


class OwnPrograms:
    """The host where there is no server: what they say goes to nobody, and nobody says anything to them."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def find(self, program: str) -> ProgramSource:
        return await in_daemon_thread(lambda: find_installable(program))

    def start(self, parent: ProgramState, program: str, source: ProgramSource, given: str) -> StartedProgram:
        arguments = parse_input(given)
        self._app.launch_terms(source, arguments, parent.standing)
        state = self._app.new_process(
            parent.username, _Nobody(), parent.tenant, parent.priority, parent.traceparent, parent
        )
        state.close_input()
        return _OwnProgram(state.process, asyncio.create_task(self._app.run(source, arguments, state)))


class _OwnProgram:
    def __init__(self, process: ProcessId, task: asyncio.Task[Any]) -> None:
        self.process = process
        self._task = task

    async def result(self) -> str | None:
        await asyncio.wait((self._task,))
        if self._task.cancelled():
            raise Cancelled(f"process {self.process} was cancelled")
        value = self._task.result()
        return None if value is None else json.dumps(value)

    def cancel(self) -> None:
        self._task.cancel()


class _Nobody:
    """A client that is not there."""

    def on_message(self, message: str) -> None: ...

    def on_file(self, content: bytes) -> None: ...

    def on_stdout(self, data: bytes) -> None: ...

    def on_stderr(self, data: bytes) -> None: ...
