"""`/ready` of a server that loses an engine: 503 until the model is loaded again, while everything else answers."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from pie_core.config import parse_config
from pie_core.contracts.driver import Progress
from pie_core.ids import ModelName
from pie_core.program_store import ProgramStore
from pie_core.server.listening import bind
from pie_core.server.server import Server, Surroundings

pytestmark = pytest.mark.slow

CONFIG = """
models: [{name: dummy, driver: {type: dummy}}]
server: {port: 0}
auth: {enabled: false}
runtime: {engine_process: true}
"""


def ignore_progress(_: Progress) -> None:
    """Nobody watches."""


async def readiness(http: aiohttp.ClientSession) -> tuple[int, str]:
    async with http.get("/ready") as answer:
        return answer.status, (await answer.json())["status"]


def test_a_lost_engine_shows_in_ready_until_the_model_is_loaded_again(tmp_path: Path) -> None:
    config = parse_config(CONFIG, "test.yaml", tmp_path)
    surroundings = Surroundings(bind("127.0.0.1", 0), None, ProgramStore(tmp_path / "programs"))

    async def main() -> None:
        async with (
            Server(config, surroundings, ignore_progress) as server,
            aiohttp.ClientSession(server.url) as http,
        ):
            assert await readiness(http) == (503, "loading")
            await server.service.models.load_all()
            assert await readiness(http) == (200, "ready")
            lost = server.app.engine_pid(ModelName("dummy"))
            assert lost is not None
            os.kill(lost, signal.SIGSTOP)
            while await readiness(http) == (200, "ready"):
                pass  # asking goes by the loop, so everything else goes on
            assert [model["state"] for model in server.service.models.listing()] == ["restarting"]
            async with http.get("/health") as answer:
                assert answer.status == 200
            while await readiness(http) != (200, "ready"):
                pass  # asking goes by the loop, so everything else goes on
            assert server.app.engine_pid(ModelName("dummy")) != lost

    asyncio.run(main())
