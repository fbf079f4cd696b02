"""The client for programs without an event loop of their own: the same calls, each of which waits for its answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pie_core.client.client import Client
from pie_core.client.process import Event, Process
from pie_core.server.status import ServerStatus
from pie_core.telemetry import traceparent

T = TypeVar("T")


class _Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pie-client", daemon=True)
        self._thread.start()

    def wait(self, call: Coroutine[Any, Any, T]) -> T:
        """Its result; Ctrl-C while waiting cancels it."""
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SyncProcess:
    """`for event in process:` waits for each event."""

    def __init__(self, loop: _Loop, process: Process) -> None:
        self._loop = loop
        self._process = process

    @property
    def id(self) -> str:
        return self._process.id

    def __iter__(self) -> Iterator[Event]:
        events = self._process.__aiter__()
        while (event := self._loop.wait(_next(events))) is not None:
            yield event

    def result(self) -> Any:
        return self._loop.wait(self._process.result())

    def signal(self, message: str) -> None:
        self._loop.wait(self._process.signal(message))

    def send_file(self, content: bytes) -> None:
        self._loop.wait(self._process.send_file(content))

    def close_input(self) -> None:
        self._loop.wait(self._process.close_input())

    def terminate(self) -> None:
        self._loop.wait(self._process.terminate())

    def detach(self) -> None:
        self._loop.wait(self._process.detach())


class SyncClient:
    """`with SyncClient(url, api_key=…) as client:`; takes what Client takes."""

    def __init__(self, url: str, **options: Any) -> None:
        self._url = url
        self._options = options
        self._loop: _Loop
        self._client: Client

    def __enter__(self) -> SyncClient:
        self._loop = _Loop()
        try:
            self._client = self._loop.wait(_entered(self._url, self._options))
        except BaseException:
            self._loop.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.wait(self._client.close())
        self._loop.close()

    def launch(
        self,
        program: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        detached: bool = False,
        priority: int = 0,
        trace: str | None = None,
    ) -> SyncProcess:
        trace = trace or traceparent.current()  # the caller's: on the client's thread there is none
        launched = self._client.launch(program, arguments, detached=detached, priority=priority, trace=trace)
        return self._process(self._loop.wait(launched))

    def launch_many(
        self, program: str, inputs: Sequence[Mapping[str, Any]], *, priority: int = 0
    ) -> list[SyncProcess]:
        launched = self._client.launch_many(program, inputs, priority=priority, trace=traceparent.current())
        return [self._process(each) for each in self._loop.wait(launched)]

    def run(self, program: str, arguments: Mapping[str, Any] | None = None) -> Any:
        return self.launch(program, arguments).result()

    def attach(self, process_id: str, after: int | None = None) -> SyncProcess:
        return self._process(self._loop.wait(self._client.attach(process_id, after)))

    def processes(self, include_ended: bool = False) -> list[dict[str, Any]]:
        return self._loop.wait(self._client.processes(include_ended))

    def check_program(self, name: str, version: str, content: bytes | None = None) -> bool:
        return self._loop.wait(self._client.check_program(name, version, content))

    def install(self, content: bytes, manifest: str = "", overwrite: bool = False) -> str:
        return self._loop.wait(self._client.install(content, manifest, overwrite))

    def install_file(self, path: Path, manifest: Path | None = None, overwrite: bool = False) -> str:
        return self._loop.wait(self._client.install_file(path, manifest, overwrite))

    def programs(self) -> list[dict[str, Any]]:
        return self._loop.wait(self._client.programs())

    def remove_program(self, name: str, version: str) -> None:
        self._loop.wait(self._client.remove_program(name, version))

    def models(self) -> list[dict[str, Any]]:
        return self._loop.wait(self._client.models())

    def load_model(self, name: str) -> None:
        self._loop.wait(self._client.load_model(name))

    def unload_model(self, name: str) -> None:
        self._loop.wait(self._client.unload_model(name))

    def status(self) -> ServerStatus:
        return self._loop.wait(self._client.status())

    def query(self, subject: str, record: str = "") -> Any:
        return self._loop.wait(self._client.query(subject, record))

    def ping(self) -> None:
        self._loop.wait(self._client.ping())

    def _process(self, process: Process) -> SyncProcess:
        return SyncProcess(self._loop, process)


async def _entered(url: str, options: Mapping[str, Any]) -> Client:
    """Made on the loop that it will live on."""
    return await Client(url, **options).__aenter__()


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)
