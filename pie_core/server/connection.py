"""One WebSocket: bytes into requests, answers and process events out, and the rules for clients that misbehave.

A client that sends too much is refused by type; one that does not read is disconnected, and its processes go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web
from blake3 import blake3

from pie_core.config import ServerConfig
from pie_core.errors import LimitExceeded, PieError, ProtocolError, Unauthenticated, Unavailable
from pie_core.server import messages as m
from pie_core.server.events import Numbered
from pie_core.server.processes import ServerProcess
from pie_core.server.rates import Rate
from pie_core.server.session import Service, Session

log = logging.getLogger(__name__)

_MAX_ANSWERS = 256  # waiting to be sent; beyond, nothing more is read
_MAX_SLOW = 32  # requests being worked on beside the others
_FAREWELL_S = 1.0
_TURN = 32  # events sent in one go
_BURST = 2.0  # seconds' worth of messages that may come at once


class Connection:
    """Runs until the client goes or is sent away."""

    def __init__(self, service: Service, request: web.BaseRequest) -> None:
        self._service = service
        self._config: ServerConfig = service.config.server
        self._request = request
        self._socket = web.WebSocketResponse(
            timeout=_FAREWELL_S,
            autoping=False,  # pings are counted
            heartbeat=self._config.ping_interval_s,
            compress=False,  # a few bytes can inflate to many
            max_msg_size=self._config.max_request_bytes,
        )
        self.session = Session(service, self)
        self._answers: deque[tuple[WSMsgType, bytes]] = deque()
        self._ready: deque[ServerProcess] = deque()
        self._is_ready: set[str] = set()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._sent = asyncio.Event()
        self._slow: set[asyncio.Task[None]] = set()
        self._requests = Rate(self._config.requests_per_s, _BURST * self._config.requests_per_s)
        self._pings = Rate(self._config.pings_per_s, _BURST * self._config.pings_per_s)
        self._loop = asyncio.get_running_loop()
        self._last_heard = self._loop.time()
        self._is_leaving = False

    @property
    def peer(self) -> str:
        return self._request.remote or "unknown"

    async def serve(self) -> web.WebSocketResponse:
        """From the handshake to the end."""
        await self._socket.prepare(self._request)
        writer = asyncio.create_task(self._write())
        login = self._loop.call_later(self._config.login_s, self._check_login)
        try:
            await self._read()
        finally:
            login.cancel()
            self.session.close()
            await _ended([writer, *self._slow])
        return self._socket

    # ---- what comes in

    async def _read(self) -> None:
        while not self._is_leaving:
            message = await self._socket.receive()
            self._last_heard = self._loop.time()
            if message.type is WSMsgType.BINARY:
                await self._take(message.data)
            elif message.type in (WSMsgType.PING, WSMsgType.PONG):
                await self._take_control(message)
            elif message.type is WSMsgType.TEXT:
                await self.leave(
                    ProtocolError("messages are MessagePack in binary frames, not text"),
                    WSCloseCode.UNSUPPORTED_DATA,
                )
            else:
                if message.type is WSMsgType.ERROR:
                    self._count_disconnect("protocol")
                return
            await self._wait_for_room()

    async def _take_control(self, message: WSMessage) -> None:
        if not self._pings.take():
            await self.leave(
                LimitExceeded(f"more than {self._config.pings_per_s:g} pings a second (server.pings_per_s)")
            )
        elif message.type is WSMsgType.PING:
            self._queue(WSMsgType.PONG, message.data)

    async def _take(self, data: bytes) -> None:
        try:
            request = m.decode_request(data)
        except m.BadMessage as error:
            self._refuse(error.corr_id, error.error, "unreadable")
            return
        kind = m.wire_name(type(request))
        if not self._requests.take():
            limit = f"{self._config.requests_per_s:g} messages a second (server.requests_per_s)"
            self._refuse(request.corr_id, LimitExceeded(f"{kind}: more than {limit}: wait a little"), kind)
        elif not self.session.is_slow(request):
            await self._answer(request)
        elif len(self._slow) >= _MAX_SLOW:
            refusal = LimitExceeded(
                f"{kind}: {_MAX_SLOW} long requests of this connection are being worked on"
            )
            self._refuse(request.corr_id, refusal, kind)
        else:
            task = asyncio.create_task(self._answer(request))
            self._slow.add(task)
            task.add_done_callback(self._slow.discard)

    async def _answer(self, request: m.Request) -> None:
        kind = m.wire_name(type(request))
        corr_id = 0 if isinstance(request, m.McpResponse) else request.corr_id
        try:
            result = await self.session.answer(request)
        except PieError as error:
            self._refuse(corr_id, error, kind)
        except Exception as error:  # a fault of ours is answered, too, and ends no connection
            log.exception("answering %s of %s", kind, self.peer)
            self._refuse(corr_id, PieError(f"the server failed: {type(error).__name__}: {error}"), kind)
        else:
            self._service.metrics.requests.labels(kind, "ok").inc()
            if result is not None and corr_id:
                self.send(m.Response(corr_id=corr_id, ok=True, result=result))

    def _refuse(self, corr_id: int, error: PieError, kind: str) -> None:
        self._service.metrics.requests.labels(kind, error.code).inc()
        self.send(m.Response(corr_id=corr_id, ok=False, result=str(error), error_code=error.code))

    async def _wait_for_room(self) -> None:
        """Nothing more is read of a client that does not read its answers."""
        while len(self._answers) >= _MAX_ANSWERS and not self._is_leaving:
            self._room.clear()
            await self._room.wait()

    # ---- what goes out

    def send(self, reply: m.Reply) -> None:
        self._queue(WSMsgType.BINARY, m.encode(reply))

    def has_events(self, process: ServerProcess) -> None:
        if process.id not in self._is_ready:
            self._is_ready.add(process.id)
            self._ready.append(process)
            self._wake.set()

    def taken_over(self, process: ServerProcess) -> None:
        self.session.attached.pop(process.id, None)
        self.send(m.Detached(process_id=process.id))

    def _queue(self, kind: WSMsgType, data: bytes) -> None:
        self._answers.append((kind, data))
        self._wake.set()

    async def _write(self) -> None:
        """Answers first, then one event of each process in turn: none of them starves the others."""
        sent = 0
        try:
            while True:
                if self._answers:
                    await self._send(*self._answers.popleft())
                    if len(self._answers) < _MAX_ANSWERS:
                        self._room.set()
                elif self._ready:
                    await self._send_event(self._ready.popleft())
                    sent += 1
                    if sent % _TURN == 0:  # sending need not wait for anything, and others want the loop, too
                        await asyncio.sleep(0)
                else:
                    self._sent.set()
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            log.info("%s has not read for %g s and is disconnected", self.peer, self._config.slow_client_s)
            self._count_disconnect("slow")
            self.abort()
        except ConnectionError:
            self.abort()  # it has gone; the reading side ends the connection

    async def _send_event(self, process: ServerProcess) -> None:
        self._is_ready.discard(process.id)
        if process.listener is not self:
            return
        event = process.events.take()
        if event is None:
            return
        if process.events.has_unsent:
            self.has_events(process)
        self._service.metrics.events.inc()
        for reply in _replies(process.id, event):
            await self._send(WSMsgType.BINARY, m.encode(reply))

    async def _send(self, kind: WSMsgType, data: bytes) -> None:
        """Raises TimeoutError when the client reads nothing for too long."""
        async with asyncio.timeout(self._config.slow_client_s):
            if kind is WSMsgType.PONG:
                await self._socket.pong(data)
            else:
                await self._socket.send_bytes(data)

    # ---- the end

    async def finish(self, error: PieError, code: int) -> None:
        """Sends what is waiting, if the client reads it, and leaves."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                while (self._answers or self._ready) and not self._is_leaving:
                    self._sent.clear()
                    await self._sent.wait()
        await self.leave(error, code)

    async def leave(self, error: PieError, code: int = WSCloseCode.POLICY_VIOLATION) -> None:
        """Says why, and closes."""
        if self._is_leaving:
            return
        self._is_leaving = True
        self._count_disconnect(error.code)
        last = m.encode(m.Response(corr_id=0, ok=False, result=str(error), error_code=error.code))
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self._socket.send_bytes(last)
                await self._socket.close(code=code, message=str(error).encode()[:120])
        self.abort()

    def abort(self) -> None:
        self._is_leaving = True
        self._room.set()
        self._sent.set()
        if self._request.transport is not None:
            self._request.transport.abort()

    def inspect(self) -> PieError | None:
        """Why the connection should end, looked at now and then."""
        principal = self.session.login.principal
        if principal is not None and not self._service.gate.holds(principal):
            return Unauthenticated("these credentials were revoked")
        idle_s = self._config.idle_s
        is_idle = idle_s is not None and self._loop.time() - self._last_heard > idle_s
        if is_idle and not self.session.is_busy and not self._slow:
            return Unavailable(f"nothing was heard for {idle_s:g} s (server.idle_s)")
        return None

    def _check_login(self) -> None:
        if self.session.login.principal is None:
            error = Unauthenticated(f"nobody has logged in for {self._config.login_s:g} s (server.login_s)")
            task = asyncio.create_task(self.leave(error))
            self._slow.add(task)
            task.add_done_callback(self._slow.discard)

    def _count_disconnect(self, reason: str) -> None:
        self._service.metrics.disconnects.labels(reason).inc()


def _replies(process_id: str, event: Numbered) -> Iterator[m.Reply]:
    output = event.output
    if isinstance(output.value, str):
        yield m.ProcessEvent(
            process_id=process_id,
            event=output.kind,
            value=output.value,
            seq=event.seq,
            dropped=event.dropped,
            is_json=output.is_json,
            error_code=output.error_code,
        )
        return
    chunks = m.chunks_of(output.value)
    file_hash = blake3(output.value).hexdigest()
    for index, data in enumerate(chunks):
        yield m.File(
            process_id=process_id,
            file_hash=file_hash,
            chunk_index=index,
            total_chunks=len(chunks),
            chunk_data=data,
            seq=event.seq,
            dropped=event.dropped,
        )


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels and waits."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
