"""A look at a running server, once or again and again, on a terminal or as lines: what `pie top` does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import typer
from rich.console import Console
from rich.live import Live

from pie_core.cli.top_screen import Screen
from pie_core.client import Client, PrivateKey
from pie_core.errors import Disconnected, Unauthenticated
from pie_core.server.status import ServerStatus

_ENDLESS = 1 << 20  # lines of a page that nobody turns


@dataclass(frozen=True, slots=True)
class Login:
    """Who asks; all None: whoever needs no key."""

    api_key: str | None = None
    username: str | None = None
    private_key: Path | None = None


class Look:
    """Asks one server again and again."""

    def __init__(self, url: str, login: Login, interval_s: float, each: bool) -> None:
        self._url = url
        self._login = login
        self._interval_s = interval_s
        self._each = each

    async def json(self, once: bool) -> None:
        async with self._connected() as client:
            async for status in self._statuses(client):
                typer.echo(msgspec.json.encode(status))
                if once:
                    return

    async def once(self) -> None:
        async with self._connected() as client:
            statuses = self._statuses(client)
            before, now = await anext(statuses), await anext(statuses)
        self._print(Console(), now, before)

    async def live(self) -> None:
        """Elsewhere than on a terminal, one after the other."""
        console, before = Console(), None
        async with self._connected() as client, _drawing_on(console) as draw:
            async for now in self._statuses(client):
                draw(self._screen(now, before))
                before = now

    async def _statuses(self, client: Client) -> AsyncIterator[ServerStatus]:
        while True:
            yield await client.status()
            await asyncio.sleep(self._interval_s)

    def _screen(self, now: ServerStatus, before: ServerStatus | None) -> Screen:
        return Screen(now, before, urlsplit(self._url).netloc, self._each)

    def _print(self, console: Console, now: ServerStatus, before: ServerStatus | None) -> None:
        _printed(console, self._screen(now, before))

    def _client(self) -> Client:
        login = self._login
        key = None if login.private_key is None else PrivateKey.read(login.private_key)
        return Client(
            self._url, api_key=login.api_key, username=login.username, private_key=key, reconnect=False
        )

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
        """Logged in. Raises what to do about it if not."""
        try:
            client = await self._client().__aenter__()
        except Disconnected as error:
            raise Disconnected(f"{error}; does `pie serve` run there?") from None
        except Unauthenticated as error:
            raise Unauthenticated(
                f"{error} (pie top --key FILE, or --user NAME --private-key FILE)"
            ) from None
        try:
            yield client
        finally:
            await client.close()


@asynccontextmanager
async def _drawing_on(console: Console) -> AsyncIterator[Callable[[Screen], None]]:
    """On a terminal, each takes the place of the one before."""
    if not console.is_terminal:
        yield lambda screen: _printed(console, screen)
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda screen: live.update(screen, refresh=True)


def _printed(console: Console, screen: Screen) -> None:
    """All of it, however long."""
    console.print(screen, height=_ENDLESS)
