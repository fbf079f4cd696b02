"""The HTTP side of the port: health, readiness, metrics and the list of models; a WebSocket opens at /.

Every path asks for an API key (`Authorization: Bearer …`) but those that tell a load balancer whether to send requests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
from aiohttp import hdrs, web

from pie_core.errors import AccessDenied, LimitExceeded, PieError, Unauthenticated
from pie_core.server.metrics import CONTENT_TYPE
from pie_core.server.session import Service

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class HttpSide:
    """Answers requests; `open_socket` takes those that become a WebSocket."""

    def __init__(self, service: Service, open_socket: Handler) -> None:
        self._service = service
        self._open_socket = open_socket
        self._routes: dict[str, tuple[str | None, Handler]] = {
            "/health": (None, self._health),
            "/ready": (None, self._ready),
            "/metrics": ("metrics", self._metrics),
            "/v1/models": ("run", self._models),
        }

    @property
    def routes(self) -> dict[str, str | None]:
        """Each path and the scope it asks for; None is open to everybody."""
        return {path: scope for path, (scope, _) in self._routes.items()}

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except Unauthenticated as error:
            return _refusal(error, 401, {hdrs.WWW_AUTHENTICATE: "Bearer"})
        except AccessDenied as error:
            return _refusal(error, 403)
        except LimitExceeded as error:
            return _refusal(error, 429, {hdrs.RETRY_AFTER: "60"})
        except PieError as error:
            return _refusal(error, 500)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/" and request.headers.get(hdrs.UPGRADE, "").lower() == "websocket":
            self._check_origin(request)
            return await self._open_socket(request)
        scope, handler = self._routes.get(request.path, ("run", _nothing_here))
        if scope is not None:
            self._check_key(request, scope)
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            return _status(
                "method-not-allowed", f"{request.path} is asked with GET", 405, {hdrs.ALLOW: "GET, HEAD"}
            )
        return await handler(request)

    def _check_key(self, request: web.BaseRequest, scope: str) -> None:
        gate = self._service.gate
        if gate.is_open:
            self._check_origin(request)
            return
        kind, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthenticated(
                f"{request.path[:100]} needs an API key, sent as `Authorization: Bearer KEY`; `pie auth add` makes one"
            )
        principal = gate.by_api_key(token.strip(), request.remote or "unknown")
        if scope not in principal.scopes:
            raise AccessDenied(f"{request.path[:100]} needs a key with the scope {scope!r}")

    def _check_origin(self, request: web.BaseRequest) -> None:
        """A browser lets any page open a WebSocket anywhere, with what the machine it runs on may reach. Where nobody
        needs credentials, a name that somebody made resolve to this machine is not taken for this machine either."""
        if self._service.gate.is_open and _host_of(f"//{request.host}") not in _LOOPBACK:
            raise AccessDenied(
                f"without authentication this server answers to localhost, not to {request.host[:100]}"
            )
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or self._is_allowed(origin, request):
            return
        raise AccessDenied(
            f"pages of {origin[:100]} may not connect; server.allowed_origins names those that may"
        )

    def _is_allowed(self, origin: str, request: web.BaseRequest) -> bool:
        allowed = self._service.config.server.allowed_origins
        if origin in allowed or "*" in allowed:
            return True
        page = _host_of(origin)
        if self._service.gate.is_open:  # a name that resolves to this machine is not enough
            return page in _LOOPBACK
        return page is not None and page == _host_of(f"//{request.host}")

    # ---- the paths

    async def _health(self, request: web.BaseRequest) -> web.Response:
        return _json({"status": "ok"})

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        """503 while models load, also anew after a model's last engine was lost, and while the server stops."""
        models = self._service.models
        is_stopping = not self._service.processes.accepts
        is_ready = models.is_ready and models.can_compute and not is_stopping
        status = "ready" if is_ready else "stopping" if is_stopping else "loading"
        return _json({"status": status, "models": models.conditions()}, 200 if is_ready else 503)

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        exposed = self._service.metrics.exposed(await self._service.inspector.status())
        return web.Response(body=exposed, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})

    async def _models(self, request: web.BaseRequest) -> web.Response:
        loaded = [model for model in self._service.models.listing() if model["state"] == "loaded"]
        return _json(
            {
                "object": "list",
                "data": [
                    {"id": model["name"], "object": "model", "created": 0, "owned_by": "pie"}
                    for model in loaded
                ],
            }
        )


async def _nothing_here(request: web.BaseRequest) -> web.Response:
    return _status("not-found", f"nothing is at {request.path[:200]}", 404)


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _refusal(error: PieError, status: int, headers: dict[str, str] | None = None) -> web.Response:
    return _status(error.code, str(error), status, headers)


def _status(code: str, message: str, status: int, headers: dict[str, str] | None = None) -> web.Response:
    return _json({"error": {"code": code, "message": message}}, status, headers)


def _json(value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, headers=headers, content_type="application/json"
    )
