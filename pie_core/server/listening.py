"""The listening socket: bound before anything slow begins, with TLS if configured, and with bounds on who connects."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pie_core.config import ServerConfig
from pie_core.errors import ConfigError

_BACKLOG = 1024
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n"
)


def bind(host: str, port: int) -> socket.socket:
    """Raises ConfigError that says who or what is in the way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"server.host {host!r} is no address to listen on: {error.strerror}") from None
    try:
        bound.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # connections of a server that was killed linger
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(_why(host, port, error)) from None
    bound.setblocking(False)
    return bound


def url_of(bound: socket.socket, is_secure: bool, scheme: str = "http") -> str:
    """How this machine reaches the socket."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}{'s' if is_secure else ''}://{host}:{port}"


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises ConfigError for one that cannot be used."""
    if config.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"server.tls_cert {config.tls_cert} cannot be used: {error}") from None
    return context


class BriefAboutBadRequests(logging.Filter):
    """Whoever sends nonsense gets one line in the log, not a traceback that fills it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.msg, record.args = "%s: %s", (record.getMessage(), " ".join(error.message.split())[:200])
            record.exc_info = None
        return True


class _Refusal(asyncio.Protocol):
    """Stands in for the one connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_REFUSAL)
        transport.close()


class Doorkeeper:
    """Makes the protocol of each new connection, bounds how many there are, and sends away who asks nothing.

    aiohttp itself waits for ever for a first request.
    """

    def __init__(self, server: web.Server, config: ServerConfig, on_refusal: Callable[[str], None]) -> None:
        self._server = server
        self._config = config
        self._on_refusal = on_refusal
        self._patience: dict[object, asyncio.TimerHandle] = {}

    def __call__(self) -> asyncio.BaseProtocol:
        if len(self._server.connections) >= self._config.max_connections:
            self._on_refusal("too-many")
            return _Refusal()
        protocol = self._server()
        loop = asyncio.get_running_loop()
        self._patience[protocol] = loop.call_later(self._config.login_s, self._lose_patience, protocol)
        return protocol

    def has_asked(self, protocol: object) -> None:
        """A request has come in whole."""
        timer = self._patience.pop(protocol, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        for timer in self._patience.values():
            timer.cancel()
        self._patience.clear()

    def _lose_patience(self, protocol: object) -> None:
        self._patience.pop(protocol, None)
        transport = getattr(protocol, "transport", None)
        if transport is not None:
            self._on_refusal("silent")
            transport.abort()


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: stop what uses it, or choose another (server.port, --port)"
    if error.errno == errno.EACCES:
        return (
            f"port {port} of {host} may not be used by this user: choose one above 1023 (server.port, --port)"
        )
    return f"cannot listen on {host} port {port}: {error.strerror} (server.host, server.port)"
