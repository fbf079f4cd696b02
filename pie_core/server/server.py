"""A whole server: the port, the models, the programs that run, and how all of it starts and stops.

bind ─▶ /health ─▶ models load ─▶ /ready ─▶ stop asked ─▶ drain: programs end ─▶ clients leave ─▶ closed
"""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from types import TracebackType

from aiohttp import WSCloseCode, web

from pie_core.app import Application
from pie_core.config import Config
from pie_core.contracts.driver import ProgressCallback
from pie_core.errors import PieError, Unavailable
from pie_core.paths import credentials_file
from pie_core.plugins import PluginRegistry
from pie_core.program_store import ProgramStore
from pie_core.server.authentication import Gate
from pie_core.server.connection import Connection
from pie_core.server.credentials import Credentials
from pie_core.server.http import HttpSide
from pie_core.server.inspection import Inspector
from pie_core.server.launches import ServerPrograms
from pie_core.server.listening import BriefAboutBadRequests, Doorkeeper, bind, tls_context, url_of
from pie_core.server.metrics import Metrics
from pie_core.server.models import Models
from pie_core.server.processes import ProcessTable, ServerProcess
from pie_core.server.programs import Programs
from pie_core.server.session import Service
from pie_core.telemetry.tracing import Tracing

log = logging.getLogger(__name__)
web_log = logging.getLogger("pie_core.server.web")
web_log.addFilter(BriefAboutBadRequests())

_INSPECTION_S = 1.0
_KEEPALIVE_S = 75.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a server finds on its machine."""

    bound: socket.socket
    credentials: Credentials | None
    store: ProgramStore

    @classmethod
    def of(cls, config: Config) -> Surroundings:
        """Raises ConfigError: the port is taken, the file of credentials cannot be used."""
        credentials = Credentials(config.auth.file or credentials_file()) if config.auth.enabled else None
        return cls(bind(config.server.host, config.server.port), credentials, ProgramStore())


class Server:
    """`async with Server(config, surroundings, …) as server:` answers at `server.url`; models come by load_models."""

    def __init__(
        self,
        config: Config,
        surroundings: Surroundings,
        progress: ProgressCallback,
        registry: PluginRegistry | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._bound = surroundings.bound
        self._tls = tls_context(config.server)
        self._app = Application(config, progress, registry, tracing)
        self._connections: set[Connection] = set()
        self._left = asyncio.Event()
        auth = config.auth
        processes = ProcessTable(self._app, config.server, self._count_end)
        models = Models(self._app, config)
        self.inspector = Inspector(self._app, models, processes)
        self.service = Service(
            config,
            Gate(surroundings.credentials, auth.challenge_s, auth.failures_per_minute, auth.tenant),
            Programs(surroundings.store),
            processes,
            models,
            Metrics(),
            self.inspector,
        )
        self._app.launches.host = ServerPrograms(self.service)
        self.http = HttpSide(self.service, self._open_socket)
        # No body is unpacked on the way in: a few bytes can inflate to many.
        self._web = web.Server(
            self._answer,
            logger=web_log,
            access_log=None,
            keepalive_timeout=_KEEPALIVE_S,
            auto_decompress=False,
        )
        self._doorkeeper = Doorkeeper(self._web, config.server, self._count_refusal)
        self._listener: asyncio.Server | None = None
        self._inspection: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return url_of(self._bound, self._tls is not None)

    @property
    def socket_url(self) -> str:
        """Where clients connect."""
        return url_of(self._bound, self._tls is not None, "ws")

    @property
    def app(self) -> Application:
        return self._app

    @property
    def connections(self) -> frozenset[Connection]:
        return frozenset(self._connections)

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    async def all_left(self) -> None:
        """Returns once no client is connected."""
        while self._connections:
            self._left.clear()
            await self._left.wait()

    async def __aenter__(self) -> Server:
        self._app.start()
        loop = asyncio.get_running_loop()
        handshake_s = None if self._tls is None else self._config.server.login_s
        self._listener = await loop.create_server(
            self._doorkeeper, sock=self._bound, ssl=self._tls, ssl_handshake_timeout=handshake_s
        )
        self._inspection = asyncio.create_task(self._inspect())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(0)

    async def load_models(self) -> None:
        """And what programs run on, so that the first one need not wait for it. Raises what the first model that
        cannot be loaded fails with."""
        await asyncio.gather(self._prepare(), self.service.models.load_all())

    def hurry(self) -> None:
        """Ends what is still running: somebody who stops the server does not want to wait."""
        self.service.processes.terminate_all("the server was told to stop at once")

    async def _prepare(self) -> None:
        try:
            await self._app.prepare()
        except PieError as error:  # programs in other languages run all the same
            log.warning("Python programs cannot run: %s", error)

    async def stop(self, patience_s: float) -> None:
        """Takes no more clients and programs, lets programs end for a while, then ends everything. Safe to repeat."""
        if self._listener is not None:
            self._listener.close()
        await self.service.processes.drain(patience_s)
        await self._send_clients_away()
        if self._inspection is not None:
            self._inspection.cancel()
            await asyncio.wait((self._inspection,))
        self._doorkeeper.close()
        await self._web.shutdown(1)
        self.service.processes.close()
        for uploads in self.service.uploads.values():
            uploads.close()
        await self._app.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self._doorkeeper.has_asked(request.protocol)
        return await self.http.answer(request)

    async def _open_socket(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = Connection(self.service, request)
        self._connections.add(connection)
        self.inspector.connections = len(self._connections)
        try:
            return await connection.serve()
        finally:
            self._connections.discard(connection)
            self._left.set()
            self.inspector.connections = len(self._connections)

    async def _send_clients_away(self) -> None:
        """Once they have what their programs said last."""
        reason = Unavailable("the server is stopping")
        leaving = [each.finish(reason, WSCloseCode.GOING_AWAY) for each in self._connections]
        await asyncio.gather(*leaving)

    async def _inspect(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _INSPECTION_S
            await asyncio.sleep(_INSPECTION_S)
            self.inspector.note_lag(loop.time() - due)
            leaving = [(each, reason) for each in self._connections if (reason := each.inspect()) is not None]
            await asyncio.gather(*(each.leave(reason) for each, reason in leaving))

    def _count_end(self, process: ServerProcess) -> None:
        self.service.metrics.process_seconds.inc(process.elapsed_s)

    def _count_refusal(self, reason: str) -> None:
        self.service.metrics.disconnects.labels(reason).inc()
