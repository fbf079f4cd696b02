"""A running program as its client sees it: an asynchronous stream of events, and ways to talk to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pie_core.errors import PieError, error_from_code

if TYPE_CHECKING:
    from pie_core.client.client import Client


@dataclass(frozen=True, slots=True)
class Event:
    """`kind` is stdout, stderr, message, file, return or error; `dropped` events before it were lost."""

    kind: str
    value: Any  # bytes of a file; the return value; text otherwise
    seq: int
    dropped: int = 0
    error_code: str | None = None

    @property
    def text(self) -> str:
        """What the program printed or said; empty for the other kinds."""
        return self.value if self.kind in ("stdout", "stderr", "message") else ""

    @property
    def error(self) -> PieError | None:
        """What ended the process."""
        return None if self.kind != "error" else error_from_code(self.error_code or "error", self.value)


class Process:
    """Made by `Client.launch` and `Client.attach`. Events wait here until they are taken."""

    def __init__(self, client: Client, process_id: str) -> None:
        self.id = process_id
        self._client = client
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._outcome: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._lost: PieError | None = None
        self.last_seq = 0

    @property
    def has_ended(self) -> bool:
        return self._outcome.done()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come, the return value or the error last. Raises Disconnected if the server goes."""
        while (event := await self._events.get()) is not None:
            yield event
            if event.kind in ("return", "error"):
                return
        self._events.put_nowait(None)  # for the next who asks
        if self._lost is not None:
            raise self._lost

    async def result(self) -> Any:
        """The return value, whether or not the events before it are taken. Raises what the program ended with."""
        event = await asyncio.shield(self._outcome)
        if event.error is not None:
            raise event.error
        return event.value

    async def signal(self, message: str) -> None:
        """A message, which the program gets from `session.receive()`."""
        await self._client.request("signal_process", process_id=self.id, message=message)

    async def send_file(self, content: bytes) -> None:
        """A file, which the program gets from `session.receive_file()`."""
        await self._client.send_chunks("transfer_file", "file_hash", content, process_id=self.id)

    async def close_input(self) -> None:
        """No more messages and files will come: `session.receive()` gives None then."""
        await self._client.request("close_input", process_id=self.id)

    async def terminate(self) -> None:
        await self._client.request("terminate_process", process_id=self.id)

    async def detach(self) -> None:
        """No more events come here; the program goes on."""
        await self._client.detach(self)

    # ---- for the client

    def put(self, event: Event) -> None:
        if event.seq <= self.last_seq:  # it came before a disconnect
            return
        self.last_seq = event.seq
        self._events.put_nowait(event)
        if event.kind in ("return", "error") and not self._outcome.done():
            self._outcome.set_result(event)

    def lose(self, error: PieError | None) -> None:
        """No more events will come: an error, or it was detached on purpose."""
        self._lost = error
        self._events.put_nowait(None)
        if error is not None and not self._outcome.done():
            self._outcome.set_exception(error)
            self._outcome.exception()  # nobody need ask


def value_of(text: str, is_json: bool) -> Any:
    return json.loads(text) if is_json else text
