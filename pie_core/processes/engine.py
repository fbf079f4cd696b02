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
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pie_core.config import parse_options
from pie_core.contracts.driver import Driver, DriverRequest, Progress, ProgressCallback
from pie_core.engine.engine import Engine
from pie_core.engine.local_port import LocalPort
from pie_core.engine.messages import Event
from pie_core.errors import LoadError, PieError
from pie_core.plugins import load_plugins
from pie_core.processes.frames import FrameStream
from pie_core.processes.heartbeat import Heart
from pie_core.processes.messages import (
    Broken,
    Commands,
    Events,
    Loaded,
    Loading,
    LoadModel,
    NotLoaded,
    ToEngine,
)

_log = logging.getLogger(__name__)


class EngineProcess:
    """Answers one stream, from LoadModel to its end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream: FrameStream[ToEngine] = FrameStream(ToEngine, self._take, self._leave)
        self._left = asyncio.Event()
        self._port: LocalPort | None = None
        self._is_loading = False

    async def serve(self, end: socket.socket) -> bool:
        """Returns when the stream has ended and the model is freed; False: it is still being loaded."""
        await self._stream.open(end)
        await self._left.wait()
        if self._port is not None:
            await self._port.close()
        return not self._is_loading

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Commands):
            assert self._port is not None, "commands come after Loaded"
            for command in message.commands:
                self._port.send(command)
        else:
            self._is_loading = True
            threading.Thread(target=self._load, args=(message,), name="pie-load", daemon=True).start()

    def _leave(self) -> None:
        self._left.set()

    # ---- loading, in a thread

    def _load(self, asked: LoadModel) -> None:
        logging.getLogger().setLevel(asked.log_level)
        try:
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
        self._port = port = LocalPort(Engine(driver, asked.engine_options, asked.model))
        port.listen(self._pass_on)
        can = driver.capabilities
        # In one turn of the loop, every ticket that the driver takes may be submitted.
        self._stream.send(Loaded(port.info, can.step_deadline_s * can.max_in_flight))

    # ---- serving

    def _pass_on(self, events: Sequence[Event]) -> None:
        self._stream.send(Events(list(events)))
        if self._port is not None and not self._port.is_ready and not self._left.is_set():
            self._stream.send(Broken())


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
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S")
    if not asyncio.run(_serve(arguments.stream, arguments.beats)):
        sys.stderr.flush()
        os._exit(1)  # a model that is half loaded cannot be freed, and nobody waits for it


if __name__ == "__main__":
    main()
