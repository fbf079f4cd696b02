"""The processes of a server: running programs with their owners, their events, and who listens to them.

launch ─▶ running ─▶ ended (its last events are kept for a while) ─▶ forgotten
              ▲ attach, detach, signal, files, terminate
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

from pie_core.app import Application
from pie_core.config import ServerConfig
from pie_core.errors import (
    Cancelled,
    LimitExceeded,
    NotFound,
    PieError,
    Unavailable,
    error_from_code,
)
from pie_core.host_api.guest_state import ProgramState
from pie_core.ids import ProcessId
from pie_core.manifest import parse_input
from pie_core.programs import ProgramSource
from pie_core.sandbox.hosting import Pending
from pie_core.server.credentials import Principal
from pie_core.server.events import EventBuffer, ProcessOutput
from pie_core.telemetry.log_lines import about

log = logging.getLogger(__name__)

_ENDED_BYTES = 256 << 20  # events of all processes that ended; the oldest are forgotten first
_UNREAD = 16  # messages of the greatest length that may be unread; of short ones it may be more


class Listener(Protocol):
    """A connection to which a process is attached."""

    def has_events(self, process: ServerProcess) -> None: ...

    def taken_over(self, process: ServerProcess) -> None:
        """Another connection has attached to the process."""


class ServerProcess:
    """One running program; a ClientLink, so what it says ends up in its events."""

    def __init__(
        self, principal: Principal, inferlet: str, given: str, keep_printed: bool, config: ServerConfig
    ):
        self.id = ProcessId("")
        self.principal = principal
        self.inferlet = inferlet
        self.given = given
        self.events = EventBuffer(config.buffered_events, config.buffered_bytes)
        self.state: ProgramState
        self.task: asyncio.Task[None]
        self.ended_s: float | None = None  # how long it ran
        self._keep_printed = keep_printed
        self._started = time.monotonic()
        self._listener: Listener | None = None
        self._config = config
        self._stdout = codecs.getincrementaldecoder("utf-8")("replace")
        self._stderr = codecs.getincrementaldecoder("utf-8")("replace")
        self._end_reason: Cancelled | None = None
        self._last: ProcessOutput | None = None

    @property
    def elapsed_s(self) -> float:
        return self.ended_s if self.ended_s is not None else time.monotonic() - self._started

    @property
    def is_running(self) -> bool:
        return self.ended_s is None

    @property
    def outcome(self) -> str:
        """`running`, `returned`, or the code of the error that ended it."""
        return "running" if self._last is None else self._last.error_code or "returned"

    @property
    def waits_for(self) -> Literal["input", "output", "itself"]:
        """What holds it, as far as its client has to do with it."""
        if self.events.is_holding:
            return "output"
        return "input" if self.state.messages.is_wanted or self.state.files.is_wanted else "itself"

    @property
    def about(self) -> dict[str, str]:
        """For log lines."""
        return about(self.id, self.state.traceparent)

    @property
    def listener(self) -> Listener | None:
        return self._listener

    # ---- what the program says

    def on_message(self, message: str) -> Pending[None] | None:
        return self.events.put(ProcessOutput("message", message))

    def on_file(self, content: bytes) -> Pending[None] | None:
        return self.events.put(ProcessOutput("file", content))

    def on_stdout(self, data: bytes) -> Pending[None] | None:
        return self._printed("stdout", self._stdout.decode(data))

    def on_stderr(self, data: bytes) -> Pending[None] | None:
        return self._printed("stderr", self._stderr.decode(data))

    def _printed(self, kind: str, text: str) -> Pending[None] | None:
        return self.events.put(ProcessOutput(kind, text)) if text and self._keep_printed else None

    # ---- what its client says

    def attach(self, listener: Listener, after: int | None = None) -> None:
        """Its events go to `listener` from now on; one before is told that they no longer go there."""
        previous, self._listener = self._listener, listener
        if previous is not None and previous is not listener:
            previous.taken_over(self)
        self.events.attach(lambda: listener.has_events(self), after)

    def detach(self, listener: Listener) -> None:
        if self._listener is listener:
            self._listener = None
            self.events.detach()

    def signal(self, message: str) -> None:
        """Raises LimitExceeded if it is too long or too many are unread, NotFound if nobody is there to read it."""
        self._require_running()
        size = len(message.encode("utf-8", errors="replace"))
        if size > self._config.max_message_bytes:
            raise LimitExceeded(
                f"a message of {size} bytes for {self.id}; at most {self._config.max_message_bytes} are taken "
                "(server.max_message_bytes)"
            )
        if self.state.messages.unread_bytes + size > _UNREAD * self._config.max_message_bytes:
            raise LimitExceeded(
                f"{self.id} has {self.state.messages.unread_bytes} bytes of messages unread: wait until it reads some"
            )
        self.state.messages.put(message)

    def give_file(self, content: bytes) -> None:
        self._require_running()
        if self.state.files.unread_bytes + len(content) > self._config.max_file_bytes:
            raise LimitExceeded(
                f"{self.id} has {self.state.files.unread_bytes} bytes of files unread; {len(content)} more would exceed"
                f" server.max_file_bytes = {self._config.max_file_bytes}: wait until it reads some"
            )
        self.state.files.put(content)

    def close_input(self) -> None:
        self._require_running()
        self.state.close_input()

    def terminate(self, reason: str) -> None:
        """Ends it, or does nothing if it has ended."""
        if self.is_running:
            self._end_reason = Cancelled(reason)
            self.task.cancel()

    def _require_running(self) -> None:
        if not self.is_running:
            raise NotFound(f"the process {self.id} has ended")

    # ---- its end

    async def returned(self) -> str:
        """Its return value as text. Raises the error that it ended with."""
        await asyncio.wait((self.task,))
        assert self._last is not None
        if self._last.kind == "error":
            raise error_from_code(self._last.error_code or "error", str(self._last.value))
        return str(self._last.value)

    async def result_as_json(self) -> str | None:
        """Like `returned`, as the program gave it."""
        text = await self.returned()
        assert self._last is not None
        return (None if text == "null" else text) if self._last.is_json else json.dumps(text)

    async def run(self, app: Application, source: ProgramSource, arguments: Any) -> None:
        """The whole life, as a task that never fails."""
        self.end(await self._outcome(app, source, arguments))

    def end(self, last: ProcessOutput) -> None:
        """Its last event; a second time does nothing."""
        if not self.is_running:
            return
        self.ended_s = time.monotonic() - self._started
        self._last = last
        for kind, decoder in (("stdout", self._stdout), ("stderr", self._stderr)):
            self._printed(kind, decoder.decode(b"", final=True))
        self.events.put(last)

    async def _outcome(self, app: Application, source: ProgramSource, arguments: Any) -> ProcessOutput:
        try:
            value = await app.run(source, arguments, self.state)
        except PieError as error:
            return _error(self._end_reason or error)
        except asyncio.CancelledError:
            return _error(self._end_reason or Cancelled("the server is stopping"))
        except Exception as error:  # ours, not the program's: its client learns that much, the log the rest
            log.exception(
                "process %s (%s) ended by a fault of the server", self.id, self.inferlet, extra=self.about
            )
            return _error(PieError(f"the server failed to run the program: {type(error).__name__}: {error}"))
        if isinstance(value, str):
            return ProcessOutput("return", value)
        return ProcessOutput("return", msgspec.json.encode(value).decode(), is_json=True)


def _error(error: PieError) -> ProcessOutput:
    return ProcessOutput("error", str(error), error_code=error.code)


class ProcessTable:
    """All processes of a server; users see their own."""

    def __init__(
        self, app: Application, config: ServerConfig, on_end: Callable[[ServerProcess], None]
    ) -> None:
        self._app = app
        self._config = config
        self._on_end = on_end
        self._processes: dict[ProcessId, ServerProcess] = {}
        self._running: dict[ProcessId, ServerProcess] = {}
        self._ended: dict[ProcessId, ServerProcess] = {}
        self._ended_bytes = 0
        self._timers: dict[ProcessId, asyncio.TimerHandle] = {}
        self.accepts = True
        self.launched = 0
        self.ended: Counter[str] = Counter()  # by outcome

    @property
    def num_running(self) -> int:
        return len(self._running)

    def launch(
        self,
        principal: Principal,
        inferlet: str,
        source: ProgramSource,
        given: str,
        keep_printed: bool = True,
        priority: int = 0,
        traceparent: str | None = None,
        parent: ProgramState | None = None,
    ) -> ServerProcess:
        """Raises InvalidRequest for input that is not a JSON object, LimitExceeded or Unavailable."""
        arguments = parse_input(given)
        self._app.launch_terms(source, arguments, None if parent is None else parent.standing)
        self._check_room(principal)
        if parent is None:
            self._check_priority(priority)
        process = ServerProcess(principal, inferlet, given, keep_printed, self._config)
        process.state = self._app.new_process(
            principal.user, process, principal.tenant, priority, traceparent, parent
        )
        process.id = process.state.process
        self._processes[process.id] = self._running[process.id] = process
        self.launched += 1
        process.task = asyncio.create_task(
            process.run(self._app, source, arguments), name=f"process {process.id}"
        )
        process.task.add_done_callback(lambda _: self._has_ended(process))
        log.info("process %s: %s of %s started", process.id, inferlet, principal.user, extra=process.about)
        return process

    def of_program(self, state: ProgramState) -> ServerProcess:
        """The process of a program that runs."""
        return self._running[state.process]

    def find(self, principal: Principal, process_id: str) -> ServerProcess:
        """Raises NotFound, for somebody else's process just as for one that does not exist."""
        process = self._processes.get(ProcessId(process_id))
        if process is None or process.principal.user != principal.user:
            raise NotFound(f"you have no process {process_id[:64]!r}; list_processes names yours")
        return process

    def of(self, principal: Principal, include_ended: bool = False) -> list[ServerProcess]:
        among = self._processes if include_ended else self._running
        return [process for process in among.values() if process.principal.user == principal.user]

    def seen_by(self, principal: Principal) -> list[ServerProcess]:
        """Those that run: with the scope `observe` everybody's, otherwise the user's own."""
        return list(self._running.values()) if "observe" in principal.scopes else self.of(principal)

    async def drain(self, patience_s: float) -> None:
        """Nothing new is started; what runs may end by itself, and what has not in time is ended."""
        self.accepts = False
        await self._wait(patience_s)
        self.terminate_all(f"the server was stopped, and {patience_s:g} s (server.drain_s) are over")
        await self._wait(None)

    def terminate_all(self, reason: str) -> None:
        for process in list(self._running.values()):
            process.terminate(reason)

    def close(self) -> None:
        for timer in self._timers.values():
            timer.cancel()

    async def _wait(self, patience_s: float | None) -> None:
        tasks = [process.task for process in self._running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=patience_s)

    def _check_room(self, principal: Principal) -> None:
        if not self.accepts:
            raise Unavailable(
                f"the server is stopping and starts no more programs ({len(self._running)} still run)"
            )
        if len(self._running) >= self._config.max_processes:
            raise LimitExceeded(
                f"{len(self._running)} programs are running, no more may (server.max_processes): try again later"
            )
        mine = len(self.of(principal))
        if mine >= self._config.max_processes_per_user:
            raise LimitExceeded(
                f"{mine} of your programs are running, no more may (server.max_processes_per_user): end some first"
            )

    def _check_priority(self, priority: int) -> None:
        if priority > self._config.max_priority:
            raise LimitExceeded(
                f"priority {priority} is more than {self._config.max_priority}, the most that this server gives"
                " (server.max_priority)"
            )

    def _has_ended(self, process: ServerProcess) -> None:
        process.end(
            _error(Cancelled("ended before it began"))
        )  # a task that is cancelled at once never runs at all
        del self._running[process.id]
        log.info(
            "process %s ended after %.3f s: %s",
            *(process.id, process.elapsed_s, process.outcome),
            extra=process.about,
        )
        self.ended[process.outcome] += 1
        self._on_end(process)
        self._ended[process.id] = process
        self._ended_bytes += process.events.num_bytes
        while len(self._ended) > self._config.max_processes or self._ended_bytes > _ENDED_BYTES:
            self._forget(next(iter(self._ended.values())))
        if process.id not in self._ended:  # too large to be kept itself
            return
        loop = asyncio.get_running_loop()
        self._timers[process.id] = loop.call_later(self._config.keep_ended_s, self._forget, process)

    def _forget(self, process: ServerProcess) -> None:
        del self._ended[process.id], self._processes[process.id]
        self._ended_bytes = sum(each.events.num_bytes for each in self._ended.values())
        timer = self._timers.pop(process.id, None)
        if timer is not None:
            timer.cancel()
