"""`python -m pie_core.processes.worker`: guests in a process of their own, beside others of its kind.

    front ◄─ stream ─► worker: runtime, guests, host API, tokenizers ◄─ a stream for each model ─► engine processes

What a program says goes to the front, which knows its client; what it asks of a model goes to the engine directly.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pie_core.contracts.driver import Progress
from pie_core.engine.messages import ModelInfo
from pie_core.errors import Cancelled, PieError
from pie_core.host_api.engine_client import EngineClient
from pie_core.host_api.guest_state import Inbox, ProgramState, ServedModel, served_model
from pie_core.host_api.interfaces import INTERFACES
from pie_core.ids import ModelName, ProcessId
from pie_core.processes.daemon_threads import in_daemon_thread
from pie_core.processes.frames import FrameStream
from pie_core.processes.garbage import set_survivors_aside
from pie_core.processes.heartbeat import Heart
from pie_core.processes.messages import Loading
from pie_core.processes.program_runner import ProgramRunner
from pie_core.processes.remote_launches import RemoteLauncher
from pie_core.processes.worker_messages import (
    AddModel,
    Channel,
    Counts,
    Input,
    Launch,
    LaunchedEnded,
    ModelAdded,
    Prepare,
    Prepared,
    ProgramLaunched,
    Raised,
    Reached,
    ReadCounts,
    RemoveModel,
    Returned,
    Said,
    StartWorker,
    Stop,
    Taken,
    ToWorker,
    Wanted,
)
from pie_core.processes.worker_port import WorkerPort, first_id
from pie_core.programs import ComponentProgram, ProgramSource, PythonProgram
from pie_core.sandbox.hosting import Pending
from pie_core.sandbox.quick_calls import built_library
from pie_core.sandbox.runtime import Runtime
from pie_core.telemetry.exporting import start_tracing
from pie_core.telemetry.log_lines import about, start_log_lines
from pie_core.telemetry.tracing import Tracing
from pie_core.text.text_model import load_text

_log = logging.getLogger(__name__)

_UNTAKEN_BYTES = 1 << 16  # that a program may have said before it waits for its client


class RemoteInbox(Inbox[Any]):
    """Asks the front for an item whenever one is waited for, and never for more: the rest stays there."""

    def __init__(self, ask: Callable[[], None], decode: Callable[[bytes], Any]) -> None:
        super().__init__(capacity=1 << 30)  # no more come than were asked for
        self._ask = ask
        self._decode = decode
        self._asked = 0

    def get(self) -> Pending[Any]:
        pending = super().get()
        waiting = sum(not waiter.abandoned for waiter in self._waiters)
        while self._asked < waiting:
            self._asked += 1
            self._ask()
        return pending

    def arrive(self, item: bytes | None) -> None:
        self._asked -= 1
        if item is None:
            self.close()
        else:
            self.put(self._decode(item))


class RemoteLink:
    """A ClientLink that goes by the front."""

    def __init__(self, process: ProcessId, send: Callable[[Said], None]) -> None:
        self._process = process
        self._send = send
        self._untaken = 0
        self._held: list[Pending[None]] = []

    def on_message(self, message: str) -> Pending[None] | None:
        return self._say("message", message.encode("utf-8", "surrogatepass"))

    def on_file(self, content: bytes) -> Pending[None] | None:
        return self._say("file", content)

    def on_stdout(self, data: bytes) -> Pending[None] | None:
        return self._say("stdout", data)

    def on_stderr(self, data: bytes) -> Pending[None] | None:
        return self._say("stderr", data)

    def taken(self, size: int) -> None:
        self._untaken -= size
        if self._untaken <= _UNTAKEN_BYTES:
            held, self._held = self._held, []
            for pending in held:
                pending.resolve(None)

    def _say(self, channel: Channel, content: bytes) -> Pending[None] | None:
        self._send(Said(self._process, channel, bytes(content)))
        self._untaken += len(content)
        if self._untaken <= _UNTAKEN_BYTES:
            return None
        pending: Pending[None] = Pending()
        self._held.append(pending)
        return pending


class RunningProgram:
    """One guest: its state, and the task in which it runs."""

    def __init__(
        self,
        state: ProgramState,
        link: RemoteLink,
        launcher: RemoteLauncher,
        task: asyncio.Task[Returned | Raised],
    ) -> None:
        self.state = state
        self.link = link
        self.launcher = launcher
        self.task = task

    def hear(self, given: Input) -> None:
        inbox = self.state.messages if given.channel == "message" else self.state.files
        assert isinstance(inbox, RemoteInbox)
        inbox.arrive(given.item)


class WorkerProcess:
    """Answers one stream, from StartWorker to its end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream: FrameStream[ToWorker] = FrameStream(ToWorker, self._take, self._leave)
        self._left = asyncio.Event()
        self._start: StartWorker
        self._runtime: Runtime
        self._runner: ProgramRunner | None = None
        self._models: dict[ModelName, ServedModel] = {}
        self._ports: dict[ModelName, list[WorkerPort]] = {}
        self._running: dict[ProcessId, RunningProgram] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._tracing: Tracing | None = None

    async def serve(self, end: socket.socket) -> None:
        await self._stream.open(end)
        await self._left.wait()
        tasks = [*self._tasks, *(running.task for running in self._running.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._runner is not None:
            await self._runner.close()
            self._runtime.close()
        if self._tracing is not None:
            await self._tracing.close()

    def _leave(self) -> None:
        self._left.set()

    def _take(self, message: ToWorker) -> None:
        match message:
            case Launch():
                self._launch(message)
            case Input():
                self._with(message.process, lambda running: running.hear(message))
            case Taken(process, size):
                self._with(process, lambda running: running.link.taken(size))
            case ProgramLaunched(process):
                self._with(process, lambda running: running.launcher.launched(message))
            case LaunchedEnded(process):
                self._with(process, lambda running: running.launcher.ended(message))
            case Stop(process):
                self._with(process, lambda running: running.task.cancel())
            case AddModel():
                self._in_background(self._add_model(message))
            case RemoveModel(model):
                self._in_background(self._remove_model(model))
            case ReadCounts():
                self._stream.send(Counts.of(self._runtime))
            case Prepare():
                self._in_background(self._prepare())
            case StartWorker():
                self._begin(message)

    def _with(self, process: ProcessId, act: Callable[[RunningProgram], object]) -> None:
        """One that has ended in the meantime hears nothing."""
        running = self._running.get(process)
        if running is not None:
            act(running)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self, start: StartWorker) -> None:
        start_log_lines(start.log_level, start.log_format, "worker")
        self._start = start
        self._tracing = None if start.traces is None else start_tracing(start.traces, "worker")
        self._runtime = Runtime(
            INTERFACES,
            Path(start.cache_folder),
            compile_limits=start.compile_limits,
            quick_calls=built_library(),
        )
        self._runner = ProgramRunner(self._runtime, self._report, self._tracing)

    @property
    def _programs(self) -> ProgramRunner:
        assert self._runner is not None, "StartWorker comes first"
        return self._runner

    def _report(self, progress: Progress) -> None:
        self._stream.send(Loading(progress.label, progress.done, progress.total, progress.unit))

    async def _prepare(self) -> None:
        try:
            await self._programs.prepare()
        except PieError as error:
            self._stream.send(Prepared(error.code, str(error)))
        else:
            self._stream.send(Prepared())

    # ---- models

    async def _add_model(self, added: AddModel) -> None:
        worker = self._start.worker
        ports = [WorkerPort(added.model, worker, path, self._has_reached) for path in added.engines_at]
        self._ports[added.model] = ports
        await self._connect(ports)
        info = next((port.info for port in ports if port.has_been_ready), None)
        if info is not None:
            await self._serve_model(added, ports, info)
        set_survivors_aside()
        self._stream.send(ModelAdded(added.model))

    async def _serve_model(self, added: AddModel, ports: list[WorkerPort], info: ModelInfo) -> None:
        for port in ports:
            port.expect(info)
        text = await in_daemon_thread(lambda: load_text(Path(added.checkpoint), info.vocab_size))
        if self._ports.get(added.model) is ports:  # and not removed meanwhile
            worker = self._start.worker
            clients = [EngineClient(port, first_id(worker), self._runtime.pump) for port in ports]
            self._models[added.model] = served_model(added.model, clients, text, worker)

    def _has_reached(self, path: str, pid: int) -> None:
        self._stream.send(Reached(path, pid))

    async def _connect(self, ports: Sequence[WorkerPort]) -> None:
        """Returns with the first connection; replicas that are lost at the moment come when they are back."""
        connecting = [self._in_background(port.connect()) for port in ports]
        await asyncio.wait(connecting, return_when=asyncio.FIRST_COMPLETED)

    async def _remove_model(self, model: ModelName) -> None:
        self._models.pop(model, None)
        for port in self._ports.pop(model, ()):
            await port.close()

    # ---- programs

    def _launch(self, asked: Launch) -> None:
        link = RemoteLink(asked.process, self._stream.send)
        launcher = RemoteLauncher(asked.process, self._stream.send)
        state = ProgramState(
            asked.process,
            asked.username,
            asked.tenant,
            self._models,
            link,
            self._start.output_bytes,
            priority=asked.priority,
            traceparent=asked.traceparent,
            launcher=launcher,
        )
        state.messages = RemoteInbox(partial(self._want, Wanted(asked.process, "message")), _text)
        state.files = RemoteInbox(partial(self._want, Wanted(asked.process, "file")), bytes)
        task = self._loop.create_task(self._answer(asked, state))
        self._running[asked.process] = RunningProgram(state, link, launcher, task)
        task.add_done_callback(partial(self._has_ended, asked.process))

    def _want(self, wanted: Wanted) -> None:
        self._stream.send(wanted)

    async def _answer(self, asked: Launch, state: ProgramState) -> Returned | Raised:
        try:
            value = await self._programs.run(_source(asked), asked.inputs, asked.limits, state)
            return Returned(asked.process, value)
        except PieError as error:
            return Raised(asked.process, error.code, str(error))
        except (
            Exception
        ) as error:  # ours, not the program's: the front tells its client that much, the log the rest
            told = about(asked.process, asked.traceparent)
            _log.exception(
                "process %s (%s) ended by a fault of its worker", asked.process, asked.name, extra=told
            )
            problem = f"the worker failed to run the program: {type(error).__name__}: {error}"
            return Raised(asked.process, PieError.code, problem)

    def _has_ended(self, process: ProcessId, task: asyncio.Task[Returned | Raised]) -> None:
        del self._running[process]
        cancelled = Raised(process, Cancelled.code, "the program was ended")  # maybe before it began
        self._stream.send(cancelled if task.cancelled() else task.result())


def _source(asked: Launch) -> ProgramSource:
    if asked.component is not None:
        return ComponentProgram(asked.name, Path(asked.component))
    return PythonProgram(asked.name, asked.files, asked.entry)


def _text(item: bytes) -> str:
    return item.decode("utf-8", "surrogatepass")


async def _serve(stream: int, beats: int) -> None:
    for inherited in (stream, beats):
        os.set_inheritable(inherited, False)
    Heart(beats)
    await WorkerProcess().serve(socket.socket(fileno=stream))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pie_core.processes.worker", description=__doc__)
    parser.add_argument("--stream", required=True, type=int, help="file descriptor of the socket")
    parser.add_argument("--beats", required=True, type=int, help="file descriptor of the heartbeat's pipe")
    arguments = parser.parse_args()
    # Who started us answers it; raised here, it would have to cross WebAssembly frames.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_log_lines("WARNING", "text", "worker")
    asyncio.run(_serve(arguments.stream, arguments.beats))


if __name__ == "__main__":
    main()
