"""Lines of standard input, read without blocking the event loop and not before somebody wants one."""

from __future__ import annotations

import asyncio
import os

from pie_core.errors import LimitExceeded

_CHUNK = 1 << 16


class StdinLines:
    """Reads the descriptor itself: a terminal, a pipe, a file. It stays in blocking mode, which stdout may share."""

    def __init__(self, descriptor: int | None, max_line_bytes: int) -> None:
        self._descriptor = descriptor
        self._max_line_bytes = max_line_bytes
        self._buffer = bytearray()
        self._ended = descriptor is None

    async def next_line(self) -> str | None:
        """The next line without its end; None when there will be no more."""
        while (end := self._buffer.find(b"\n")) < 0 and not self._ended:
            self._refuse_too_long(len(self._buffer))
            await self._read_more()
        if end < 0:
            return self._take(len(self._buffer)) if self._buffer else None
        return self._take(end + 1)

    def _take(self, length: int) -> str:
        line = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._refuse_too_long(len(line))
        return line.decode("utf-8", errors="replace").rstrip("\r\n")

    def _refuse_too_long(self, length: int) -> None:
        if length > self._max_line_bytes + 1:
            raise LimitExceeded(
                f"a line of standard input is longer than {self._max_line_bytes} bytes (server.max_message_bytes)"
            )

    async def _read_more(self) -> None:
        assert self._descriptor is not None
        try:
            await _readable(self._descriptor)
            chunk = os.read(self._descriptor, _CHUNK)
        except OSError:  # the descriptor was closed, or the terminal went away: both end the input
            chunk = b""
        self._buffer += chunk
        self._ended = not chunk


async def _readable(descriptor: int) -> None:
    """Returns when a read would not block."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    try:
        loop.add_reader(descriptor, _resolve, ready)
    except PermissionError:  # epoll takes no plain files, and those never block
        return
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
