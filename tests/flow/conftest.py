"""Programs as their authors write them, on a whole pie in this process: real guests, real engine, dummy driver."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pie_core.app import Application
from pie_core.config import Config, parse_config
from pie_core.contracts.driver import Progress
from pie_core.engine.messages import Event, ReadStatus, Status
from pie_core.host_api.guest_state import ProgramState
from pie_core.programs import PythonProgram
from pie_core.testing.recording_client import RecordingClient

DUMMY = """
models:
  - name: dummy
    driver: {type: dummy}
"""


class Pie:
    """A started application, and short ways to use it."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def state(self, client: RecordingClient | None = None, user: str = "alice") -> ProgramState:
        return self.app.new_process(user, client or RecordingClient())

    async def run(self, source: str, state: ProgramState | None = None, **arguments: Any) -> Any:
        """Runs the source text of a program."""
        return await self.app.run(program(source), arguments, state or self.state())

    async def status(self) -> Status:
        (model,) = self.app.models.values()
        answered = asyncio.Event()
        answers: list[Status] = []

        def finish(event: Event) -> None:
            assert isinstance(event, Status)
            answers.append(event)
            answered.set()

        model.engine.request(lambda request: ReadStatus(request=request), finish)
        await answered.wait()
        return answers[0]

    async def until(self, holds: Callable[[Status], bool]) -> None:
        """Returns once the engine's status is so."""
        while not holds(await self.status()):
            pass  # asking goes by the loop, so everything else goes on

    async def check_nothing_is_left(self) -> None:
        """Every page, context, request and guest of the programs that ran is gone."""
        (model,) = self.app.models.values()
        await self.until(lambda status: status.running == 0)  # steps that ran ahead
        status = await self.status()
        assert status.contexts == status.waiting == 0
        assert status.free_pages == status.total_pages
        assert model.engine.open_requests == 0
        assert self.app.runtime.live_guests == 0


def program(source: str) -> PythonProgram:
    return PythonProgram("test-program", (("main.py", textwrap.dedent(source)),), "main.py")


StartPie = Callable[..., Any]


def ignore_progress(_: Progress) -> None:
    """Nobody watches."""


@pytest.fixture
def start_pie(request: pytest.FixtureRequest) -> StartPie:
    """`async with start_pie(yaml) as pie`; compiled guests are kept between test runs."""
    folder = Path(request.config.cache.mkdir("aot"))

    @asynccontextmanager
    async def start(models: str = DUMMY, runtime: str = "") -> AsyncIterator[Pie]:
        config: Config = parse_config(
            f"{models}\nruntime: {{program_cache: '{folder}'{runtime}}}\n", "test.yaml", folder
        )
        async with Application(config, ignore_progress) as app:
            yield Pie(app)

    return start


@pytest.fixture
def on_pie(start_pie: StartPie) -> Callable[[Callable[[Pie], Coroutine[Any, Any, Any]]], Any]:
    """Runs one coroutine function on a fresh pie, and checks that nothing is left behind."""

    def run(scenario: Callable[[Pie], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            async with start_pie() as pie:
                value = await scenario(pie)
                await pie.check_nothing_is_left()
                return value

        return asyncio.run(main())

    return run
