"""A whole server in this process: real sockets, real guests, the dummy driver."""

from __future__ import annotations

import asyncio
import gc
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pie_core.client import Client
from pie_core.config import parse_config
from pie_core.contracts.driver import Progress
from pie_core.engine.messages import Status
from pie_core.program_store import ProgramStore
from pie_core.server.credentials import Credentials
from pie_core.server.listening import bind
from pie_core.server.server import Server, Surroundings
from pie_core.telemetry.tracing import Tracing

MODELS = """
models:
  - {name: first, driver: {type: dummy}}
  - {name: second, driver: {type: dummy}}
"""


def ignore_progress(_: Progress) -> None:
    """Nobody watches."""


class Pie:
    """A started server, and short ways to use it."""

    def __init__(self, server: Server, store: ProgramStore, credentials_file: Path) -> None:
        self.server = server
        self.store = store
        self.credentials_file = credentials_file

    def client(self, **options: Any) -> Client:
        return Client(self.server.socket_url, **{"username": "alice", **options})

    def install(self, name: str, source: str, version: str = "1.0.0", parameters: str = "") -> str:
        """Makes the source text of a program launchable; `parameters` are lines of its manifest."""
        folder = self.credentials_file.parent / f"{name}-{version}"
        folder.mkdir()
        (folder / "Pie.toml").write_text(
            f'[package]\nname = "{name}"\nversion = "{version}"\n[parameters]\n{parameters}\n'
        )
        (folder / "main.py").write_text(textwrap.dedent(source))
        return self.store.add(folder).label

    async def check_nothing_is_left(self) -> None:
        """No process, guest, context, page, request or connection."""
        assert self.server.service.processes.num_running == 0
        assert self.server.app.runtime.live_guests == 0
        while any(status.running for _, status in await self._engines()):
            pass  # steps that ran ahead; asking goes by the loop, so everything else goes on
        for name, status in await self._engines():
            assert status.contexts == status.waiting == 0, name
            assert status.free_pages == status.total_pages, name
        assert self.server.num_connections == 0

    async def _engines(self) -> list[tuple[str, Status]]:
        """What each replica's engine says, with its model's name."""
        found: list[tuple[str, Status]] = []
        for name, statuses in (await self.server.service.models.statuses()).items():
            for status in statuses:
                assert status is not None, name
                found.append((name, status))
        return found


StartServer = Callable[..., Any]


@pytest.fixture
def start_server(request: pytest.FixtureRequest, tmp_path: Path) -> StartServer:
    """`async with start_server(server="…", auth="…") as pie`; without `auth` nobody needs credentials."""
    cache = Path(request.config.cache.mkdir("aot"))

    @asynccontextmanager
    async def start(
        server: str = "",
        auth: str = "enabled: false",
        models: str = MODELS,
        runtime: str = "",
        telemetry: str = "",
        tracing: Tracing | None = None,
    ) -> AsyncIterator[Pie]:
        text = (
            f"{models}\nserver: {{port: 0, {server}}}\nauth: {{{auth}}}\n"
            f"runtime: {{program_cache: '{cache}', {runtime}}}\ntelemetry: {{{telemetry}}}\n"
        )
        config = parse_config(text, "test.yaml", tmp_path)
        file = tmp_path / "authorized.yaml"
        credentials = Credentials(file) if config.auth.enabled else None
        store = ProgramStore(tmp_path / "programs")
        surroundings = Surroundings(bind(config.server.host, config.server.port), credentials, store)
        async with Server(config, surroundings, ignore_progress, tracing=tracing) as running:
            await running.load_models()
            yield Pie(running, store, file)

    return start


Scenario = Callable[[Pie], Coroutine[Any, Any, Any]]


@pytest.fixture
def on_server(start_server: StartServer) -> Callable[..., Any]:
    """Runs one coroutine function on a fresh server, and checks that nothing is left behind."""

    def run(scenario: Scenario, **options: Any) -> Any:
        async def main() -> Any:
            async with start_server(**options) as pie:
                value = await scenario(pie)
                await pie.server.all_left()
                await pie.check_nothing_is_left()
                return value

        before = open_files()
        value = asyncio.run(main())
        if open_files() > before:
            gc.collect()  # a compiled program keeps its file open while it lives
        assert open_files() <= before
        return value

    return run


def open_files() -> int:
    """Sockets included; 0 where the system does not tell."""
    listing = Path("/proc/self/fd")
    return len(list(listing.iterdir())) if listing.is_dir() else 0
