"""One connection to a server: logs in, asks, and brings each process its events; comes back after a disconnect."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import msgspec
from blake3 import blake3

from pie_core import __version__
from pie_core.client.keys import PrivateKey
from pie_core.client.mcp import StdioMcpServer
from pie_core.client.process import Event, Process, value_of
from pie_core.errors import Disconnected, McpRefused, PieError, Unauthenticated, error_from_code
from pie_core.server import messages as m
from pie_core.server.status import ServerStatus
from pie_core.telemetry import traceparent

log = logging.getLogger(__name__)

_Socket = aiohttp.ClientWebSocketResponse
McpAnswer = Callable[[str, Any], Awaitable[Any]]  # (method, params) -> result

_NOT_NEEDED = "Authenticated (Engine disabled authentication)"
_RETRIES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_MAX_MESSAGE = 64 << 20
_KINDS: dict[str, Callable[..., m.Request]] = {m.wire_name(kind): kind for kind in m.REQUESTS}


class Client:
    """`async with Client(url, api_key=…) as client:`. With `reconnect`, a lost connection is made again and processes
    go on where they were; requests that were open fail with Disconnected, because they may have been done or not."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        username: str | None = None,
        private_key: PrivateKey | None = None,
        reconnect: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._url = url
        self._api_key = api_key
        self._username = username
        self._private_key = private_key
        self._reconnect = reconnect
        self._tls = tls
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[str]] = {}
        self._processes: dict[str, Process] = {}
        self._early: dict[str, list[m.Reply]] = {}  # of processes whose id is on its way to us
        self._chunks: dict[str, list[bytes]] = {}
        self._mcp: dict[str, McpAnswer] = {}
        self._mcp_servers: dict[str, StdioMcpServer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._http: aiohttp.ClientSession | None = None
        self._socket: _Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._is_closing = False
        self.server: dict[str, Any] = {}  # what it said to hello

    async def __aenter__(self) -> Client:
        self._http = aiohttp.ClientSession()
        try:
            self._socket = await self._connect()
        except BaseException:
            await self._http.close()
            raise
        self._reader = asyncio.create_task(self._keep_reading())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Processes go on without us."""
        self._is_closing = True
        if self._socket is not None:
            await self._socket.close()
        for task in [*self._tasks, *([self._reader] if self._reader is not None else [])]:
            task.cancel()
            await asyncio.wait((task,))
        self._lose(Disconnected("the client was closed"))
        for server in self._mcp_servers.values():
            await server.close()
        if self._http is not None:
            await self._http.close()

    # ---- programs

    async def check_program(self, name: str, version: str, content: bytes | None = None) -> bool:
        """Whether the server has it; with `content`, whether it has just that."""
        wasm_hash = None if content is None else blake3(content).hexdigest()
        found = await self.request("check_program", name=name, version=version, wasm_hash=wasm_hash)
        return bool(json.loads(found))

    async def install(self, content: bytes, manifest: str = "", overwrite: bool = False) -> str:
        """An artifact of `pie build`, or a component with its manifest. Goes on where an interrupted upload ended.

        Returns name@version.
        """
        digest = blake3(content).hexdigest()
        start = json.loads(await self.request("resume_upload", program_hash=digest))
        return await self.send_chunks(
            "add_program", "program_hash", content, start, manifest=manifest, force_overwrite=overwrite
        )

    async def install_file(self, path: Path, manifest: Path | None = None, overwrite: bool = False) -> str:
        content = await asyncio.to_thread(path.read_bytes)
        text = "" if manifest is None else await asyncio.to_thread(manifest.read_text, "utf-8")
        return await self.install(content, text, overwrite)

    async def programs(self) -> list[dict[str, Any]]:
        return list(json.loads(await self.request("list_programs")))

    async def remove_program(self, name: str, version: str) -> None:
        await self.request("remove_program", name=name, version=version)

    # ---- processes

    async def launch(
        self,
        program: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        detached: bool = False,
        priority: int = 0,
        trace: str | None = None,
    ) -> Process:
        """Starts name or name@version. `detached`: no events come here, and nothing printed is kept.

        Passes of programs with a higher `priority` go first. `trace`: the traceparent that it belongs to, without one
        that of OpenTelemetry's current span, if there is any.
        """
        fields = {"inferlet": program, "input": _text(arguments), "capture_outputs": not detached}
        if priority:
            fields["priority"] = priority
        process_id = await self.request("launch_process", **fields, **_trace(trace))
        return self._adopt(process_id, attached=not detached)

    async def launch_many(
        self,
        program: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        priority: int = 0,
        trace: str | None = None,
    ) -> list[Process]:
        """All of them, or none and an error."""
        fields = {"inferlet": program, "inputs": [_text(each) for each in inputs], "capture_outputs": True}
        if priority:
            fields["priority"] = priority
        found = await self.request("launch_processes", **fields, **_trace(trace))
        return [self._adopt(process_id) for process_id in json.loads(found)]

    async def run(self, program: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Starts a program and returns what it returns."""
        return await (await self.launch(program, arguments)).result()

    async def attach(self, process_id: str, after: int | None = None) -> Process:
        """The events of a process that nobody has got yet; with `after`, all behind that number that are kept."""
        if after is not None:
            self._early.pop(process_id, None)  # all that was on its way comes again
        await self.request("attach_process", process_id=process_id, after=after)
        return self._adopt(process_id)

    async def detach(self, process: Process) -> None:
        await self.request("detach_process", process_id=process.id)
        if self._processes.pop(process.id, None) is not None:
            process.lose(None)

    async def processes(self, include_ended: bool = False) -> list[dict[str, Any]]:
        return list(json.loads(await self.request("list_processes", include_ended=include_ended)))

    # ---- the rest

    async def models(self) -> list[dict[str, Any]]:
        return list(json.loads(await self.request("list_models")))

    async def load_model(self, name: str) -> None:
        await self.request("load_model", name=name)

    async def unload_model(self, name: str) -> None:
        await self.request("unload_model", name=name)

    async def status(self) -> ServerStatus:
        """How the server does; with a key of the scope `observe`, its `processes` are those of everybody."""
        return msgspec.json.decode(await self.request("read_status"), type=ServerStatus)

    async def query(self, subject: str, record: str = "") -> Any:
        return json.loads(await self.request("query", subject=subject, record=record))

    async def ping(self) -> None:
        await self.request("ping")

    async def register_mcp_server(
        self, name: str, answer: McpAnswer | None = None, *, command: Sequence[str] = ()
    ) -> None:
        """Offers an MCP server to the programs of this connection: a `command` to run here, or a function that gets
        each call's method and params."""
        if answer is None:
            server = self._mcp_servers[name] = await StdioMcpServer.start(name, command)
            answer = server.answer
        self._mcp[name] = answer
        await self.request("register_mcp_server", name=name, transport="stdio")

    async def request(self, kind: str, **fields: Any) -> str:
        """Any message of the protocol by its name. Raises the error that the server answers with."""
        corr_id = next(self._numbers)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._open[corr_id] = answer
        try:
            await self._send(_KINDS[kind](corr_id=corr_id, **fields))
            return await answer
        finally:
            self._open.pop(corr_id, None)

    async def send_chunks(
        self, kind: str, hash_field: str, content: bytes, start: int = 0, **fields: Any
    ) -> str:
        """Something large, chunk by chunk from `start` on; what the server answers to the last."""
        corr_id = next(self._numbers)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._open[corr_id] = answer
        chunks = m.chunks_of(content)
        fields |= {"corr_id": corr_id, "total_chunks": len(chunks), hash_field: blake3(content).hexdigest()}
        try:
            for index, data in enumerate(chunks[start:], start):
                if answer.done():  # refused: the rest need not be sent
                    break
                await self._send(_KINDS[kind](chunk_index=index, chunk_data=data, **fields))
            return await answer
        finally:
            self._open.pop(corr_id, None)

    # ---- connecting

    async def _connect(self) -> _Socket:
        """Logged in; nobody else sends before that. Raises Disconnected, or what the login is refused with."""
        assert self._http is not None
        try:
            socket = await self._http.ws_connect(
                self._url, max_msg_size=_MAX_MESSAGE, ssl=self._tls if self._tls is not None else True
            )
        except aiohttp.ClientError as error:
            raise Disconnected(f"cannot connect to {self._url}: {error}") from None
        try:
            await self._log_in(socket)
        except BaseException:
            await socket.close()
            raise
        return socket

    async def _log_in(self, socket: _Socket) -> None:
        """Asked and answered in turn, because nothing else is read yet."""
        version = f"pie {__version__}"
        hello = await self._ask(socket, m.Hello(corr_id=self._next(), protocol=m.PROTOCOL, client=version))
        self.server = json.loads(hello)
        if self._api_key is not None and "api-key" in self.server["login"]:
            await self._ask(socket, m.AuthByToken(corr_id=self._next(), token=self._api_key))
            return
        user = self._username or "anonymous"
        answer = await self._ask(socket, m.AuthIdentify(corr_id=self._next(), username=user))
        if answer == _NOT_NEEDED:
            return
        if self._private_key is None:
            raise Unauthenticated(
                f"{self._url} asks for credentials: give api_key, or username and private_key"
            )
        signature = base64.b64encode(self._private_key.sign(base64.b64decode(answer))).decode()
        await self._ask(socket, m.AuthProve(corr_id=self._next(), signature=signature))

    def _next(self) -> int:
        return next(self._numbers)

    async def _ask(self, socket: _Socket, request: m.Request) -> str:
        await self._send_to(socket, request)
        while True:
            reply = await self._receive(socket)
            if isinstance(reply, m.Response) and reply.corr_id in (request.corr_id, 0):
                if not reply.ok:
                    raise _error_of(reply)
                return reply.result
            self._take(reply)

    async def _send(self, request: m.Request) -> None:
        if self._socket is None or self._socket.closed:
            raise Disconnected(f"there is no connection to {self._url}")
        await self._send_to(self._socket, request)

    async def _send_to(self, socket: _Socket, request: m.Request) -> None:
        try:
            await socket.send_bytes(m.encode(request))
        except ConnectionError as error:
            raise Disconnected(f"{self._url}: {error}") from None

    async def _receive(self, socket: _Socket) -> m.Reply:
        message = await socket.receive()
        if message.type is not aiohttp.WSMsgType.BINARY:
            code = socket.close_code
            reason = message.extra if message.type is aiohttp.WSMsgType.CLOSE else None
            raise Disconnected(f"{self._url} closed the connection ({code}{f': {reason}' if reason else ''})")
        try:
            return m.decode_reply(message.data)
        except m.BadMessage as error:
            raise error.error from None

    async def _keep_reading(self) -> None:
        assert self._socket is not None
        while True:
            try:
                while True:
                    self._take(await self._receive(self._socket))
            except Disconnected as error:
                self._fail_requests(error)
                if self._is_closing or not self._reconnect or not await self._come_back():
                    self._lose(error)
                    return
            except PieError as error:
                self._lose(error)
                return

    async def _come_back(self) -> bool:
        """Connects again and asks for what each process has said since; false if the server is gone for good."""
        for delay in _RETRIES_S:
            await asyncio.sleep(delay)
            try:
                socket = await self._connect()
                await self._take_up(socket)
            except Disconnected:
                continue
            except PieError as error:
                log.warning("%s does not take us back: %s", self._url, error)
                return False
            self._socket = socket
            return True
        return False

    async def _take_up(self, socket: _Socket) -> None:
        """What the connection before was there for."""
        for name in self._mcp:
            await self._ask(socket, m.RegisterMcpServer(corr_id=self._next(), name=name, transport="stdio"))
        for process in list(self._processes.values()):
            await self._attach_again(socket, process)

    async def _attach_again(self, socket: _Socket, process: Process) -> None:
        request = m.AttachProcess(corr_id=self._next(), process_id=process.id, after=process.last_seq)
        try:
            await self._ask(socket, request)
        except Disconnected:
            raise
        except PieError as error:  # it is forgotten there: its client must learn it, the others go on
            self._processes.pop(process.id, None)
            process.lose(error)

    # ---- what comes

    def _take(self, reply: m.Reply) -> None:
        if isinstance(reply, m.Response):
            self._take_response(reply)
        elif isinstance(reply, m.ProcessEvent | m.File):
            if reply.process_id in self._processes:
                self._take_event(self._processes[reply.process_id], reply)
            else:
                self._early.setdefault(reply.process_id, []).append(reply)
        elif isinstance(reply, m.Detached):
            process = self._processes.pop(reply.process_id, None)
            if process is not None:
                process.lose(Disconnected(f"another client has attached to the process {process.id}"))
        elif isinstance(reply, m.McpRequest):
            task = asyncio.create_task(self._answer_mcp(reply))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _take_response(self, response: m.Response) -> None:
        if response.corr_id == 0:
            log.warning("%s: %s", self._url, response.result)
            return
        answer = self._open.get(response.corr_id)
        if answer is None or answer.done():
            return
        if response.ok:
            answer.set_result(response.result)
        else:
            answer.set_exception(_error_of(response))

    def _take_event(self, process: Process, reply: m.ProcessEvent | m.File) -> None:
        if isinstance(reply, m.File):
            self._take_chunk(process, reply)
            return
        value = value_of(reply.value, reply.is_json)
        process.put(Event(reply.event, value, reply.seq, reply.dropped, reply.error_code))
        if process.has_ended:
            self._processes.pop(process.id, None)

    def _take_chunk(self, process: Process, chunk: m.File) -> None:
        if chunk.chunk_index == 0:  # a transfer that a disconnect cut off starts again
            self._chunks[process.id] = []
        chunks = self._chunks.setdefault(process.id, [])
        chunks.append(chunk.chunk_data)
        if chunk.chunk_index == chunk.total_chunks - 1:
            del self._chunks[process.id]
            process.put(Event("file", b"".join(chunks), chunk.seq, chunk.dropped))

    def _adopt(self, process_id: str, attached: bool = True) -> Process:
        process = Process(self, process_id)
        early = self._early.pop(process_id, [])
        if attached:
            self._processes[process_id] = process
        for reply in early:
            assert isinstance(reply, m.ProcessEvent | m.File)
            self._take_event(process, reply)
        return process

    async def _answer_mcp(self, request: m.McpRequest) -> None:
        ok, result = True, ""
        try:
            answer = self._mcp[request.server_name]
            result = json.dumps(await answer(request.method, json.loads(request.params)))
        except McpRefused as error:
            ok, result = False, str(error)
        except Exception as error:  # whatever it is, the program that asked is to learn it
            ok, result = False, json.dumps({"code": -32000, "message": f"{type(error).__name__}: {error}"})
        await self._send(m.McpResponse(corr_id=request.corr_id, ok=ok, result=result))

    # ---- the end of a connection

    def _fail_requests(self, error: PieError) -> None:
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(error)

    def _lose(self, error: PieError) -> None:
        self._fail_requests(error)
        for process in self._processes.values():
            process.lose(error)
        self._processes.clear()


def _error_of(response: m.Response) -> PieError:
    return error_from_code(response.error_code or "error", response.result)


def _trace(given: str | None) -> dict[str, str]:
    """As a field of a message; servers of Pie 0.4 know none."""
    found = given or traceparent.current()
    return {} if found is None else {"traceparent": found}


def _text(given: Mapping[str, Any] | None) -> str:
    return msgspec.json.encode(given or {}).decode()
