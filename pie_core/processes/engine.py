"""`python -m pie_core.processes.engine`: one model with its driver and engine, served to the process that started it.

    stream ─► LoadModel ─► driver.load (a thread) ─► Loaded
    stream ─► Commands ─► LocalPort ─► Engine ─► Driver ─► … ─► Events ─► stream

It ends when the stream does, so it never outlives who started it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pie_core.config import parse_options
from pie_core.contracts.driver import Driver, DriverRequest, Progress, ProgressCallback
from pie_core.engine.local_port import LocalPort
from pie_core.engine.messages import Command, CreateContext, EndProcess, Event, OpenSnapshot, by_owner
from pie_core.engine.traced_engine import engine_of
from pie_core.errors import LoadError, PieError
from pie_core.ids import ProcessId
from pie_core.plugins import load_plugins
from pie_core.processes.frames import FrameStream
from pie_core.processes.garbage import set_survivors_aside
from pie_core.processes.heartbeat import Heart
from pie_core.processes.messages import (
    Broken,
    Commands,
    Events,
    Join,
    Loaded,
    Loading,
    LoadModel,
    NotLoaded,
    ToEngine,
)
from pie_core.processes.worker_port import ID_BITS
from pie_core.telemetry.exporting import start_tracing
from pie_core.telemetry.log_lines import start_log_lines
from pie_core.telemetry.tracing import Tracing

_log = logging.getLogger(__name__)


class Link:
    """Where the events of one worker go, and which processes end with it."""

    def __init__(self, home: EngineProcess) -> None:
        self._home = home
        self._worker: int | None = None
        self._processes: set[ProcessId] = set()
        self.stream: FrameStream[ToEngine] = FrameStream(ToEngine, self._take, self._leave)

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Join):
            self._worker = message.worker
            self._home.join(message.worker, self.stream)
        elif isinstance(message, Commands):
            for command in message.commands:
                if isinstance(command, CreateContext | OpenSnapshot):
                    self._processes.add(command.process)
                elif isinstance(command, EndProcess):
                    self._processes.discard(command.process)
            self._home.perform(message.commands)

    def _leave(self) -> None:
        if self._worker is not None:
            self._home.part(self._worker, self._processes)


class EngineProcess:
    """Answers the stream of who started it, from LoadModel to its end, and those of workers beside it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream: FrameStream[ToEngine] = FrameStream(ToEngine, self._take, self._leave)
        self._left = asyncio.Event()
        self._port: LocalPort | None = None
        self._loaded_as: Loaded
        self._streams: dict[int, FrameStream[ToEngine]] = {0: self._stream}  # by worker; 0 is who started us
        self._is_loading = self._has_workers = False
        self._tracing: Tracing | None = None
        self._opening: asyncio.Task[None] | None = None

    async def serve(self, end: socket.socket) -> bool:
        """Returns when the stream has ended and the model is freed; False: it is still being loaded."""
        await self._stream.open(end)
        await self._left.wait()
        for stream in list(self._streams.values()):
            stream.abort()
        if self._port is not None:
            await self._port.close()
        if self._tracing is not None:
            await self._tracing.close()
        return not self._is_loading

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Commands):
            self.perform(message.commands)
        elif isinstance(message, LoadModel):
            self._is_loading = True
            threading.Thread(target=self._load, args=(message,), name="pie-load", daemon=True).start()

    def _leave(self) -> None:
        self._left.set()

    def perform(self, commands: Sequence[Command]) -> None:
        assert self._port is not None, "commands come after Loaded"
        self._port.send_all(commands)

    # ---- workers

    def join(self, worker: int, stream: FrameStream[ToEngine]) -> None:
        self._streams[worker] = stream
        stream.send(self._loaded_as)

    def part(self, worker: int, processes: Iterable[ProcessId]) -> None:
        """A worker is gone, and what it ran."""
        self._streams.pop(worker, None)
        if not self._left.is_set():
            self.perform([EndProcess(process) for process in processes])

    async def _open_to_workers(self, path: str) -> None:
        try:
            await self._loop.create_unix_server(lambda: Link(self).stream, path)
        except OSError as error:
            self._not_loaded(LoadError(f"cannot listen for workers at {path}: {error}"))
        else:
            self._stream.send(self._loaded_as)

    # ---- loading, in a thread

    def _load(self, asked: LoadModel) -> None:
        start_log_lines(asked.log_level, asked.log_format, f"engine {asked.model}")
        try:
            if asked.traces is not None:
                self._tracing = start_tracing(asked.traces, "engine")
            driver = _load_driver(asked, self._report)
        except PieError as error:
            self._in_loop(self._not_loaded, error)
        except Exception as error:  # whatever a driver raises, those who wait for the model are told
            _log.exception("driver %r did not load model %r", asked.driver, asked.model)
            cause = f"driver {asked.driver!r} failed to load the model: {type(error).__name__}: {error}"
            self._in_loop(self._not_loaded, LoadError(cause))
        else:
            self._in_loop(self._loaded, driver, asked)

    def _report(self, progress: Progress) -> None:
        message = Loading(progress.label, progress.done, progress.total, progress.unit)
        self._in_loop(self._stream.send, message)

    def _in_loop(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            return

    def _not_loaded(self, error: PieError) -> None:
        self._is_loading = False
        self._stream.send(NotLoaded(error.code, str(error)))

    def _loaded(self, driver: Driver, asked: LoadModel) -> None:
        self._is_loading = False
        set_survivors_aside()
        engine = engine_of(driver, asked.engine_options, asked.model, self._tracing)
        self._port = port = LocalPort(engine)
        port.listen(self._pass_on)
        can = driver.capabilities
        # In one turn of the loop, every ticket that the driver takes may be submitted.
        self._loaded_as = Loaded(port.info, os.getpid(), can.step_deadline_s * can.max_in_flight)
        if asked.listen_at is None:
            self._stream.send(self._loaded_as)
        else:
            self._has_workers = True
            self._opening = self._loop.create_task(self._open_to_workers(asked.listen_at))

    # ---- serving

    def _pass_on(self, events: Sequence[Event]) -> None:
        for worker, batch in self._by_worker(events).items():
            if worker in self._streams:  # one that has gone hears nothing
                self._streams[worker].send(Events(batch))
        if self._port is not None and not self._port.is_ready and not self._left.is_set():
            self._stream.send(Broken())

    def _by_worker(self, events: Sequence[Event]) -> dict[int, Sequence[Event]]:
        if not self._has_workers:
            return {0: events}
        return dict(by_owner(events, lambda request: request >> ID_BITS))


def _load_driver(asked: LoadModel, report: ProgressCallback) -> Driver:
    registry = load_plugins()
    declaration = registry.driver(asked.driver)
    return declaration.load(
        DriverRequest(
            model_path=None if asked.path is None else Path(asked.path),
            device=asked.device,
            options=parse_options(declaration.options, asked.driver_options),
            architectures=registry.architectures,
            media=registry.media,
            progress=report,
            swap_bytes=asked.engine_options.swap_bytes or 0,
        )
    )


async def _serve(stream: int, beats: int) -> bool:
    for inherited in (stream, beats):
        os.set_inheritable(inherited, False)  # a process that the driver starts must not keep them open
    Heart(beats)
    return await EngineProcess().serve(socket.socket(fileno=stream))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pie_core.processes.engine", description=__doc__)
    parser.add_argument("--stream", required=True, type=int, help="file descriptor of the socket")
    parser.add_argument("--beats", required=True, type=int, help="file descriptor of the heartbeat's pipe")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us answers it
    start_log_lines("WARNING", "text", "engine")
    if not asyncio.run(_serve(arguments.stream, arguments.beats)):
        sys.stderr.flush()
        os._exit(1)  # a model that is half loaded cannot be freed, and nobody waits for it


if __name__ == "__main__":
    main()
