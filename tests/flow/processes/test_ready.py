"""`/ready` of a server that loses an engine: 503 until the model is loaded again, while everything else answers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
models: [{{name: dummy, replicas: {replicas}, driver: {{type: dummy, options: {{step_ms: {step_ms}}}}}}}]
server: {{port: 0}}
auth: {{enabled: false}}
runtime: {{engine_process: true, workers: {workers}}}
"""


def ignore_progress(_: Progress) -> None:
    """Nobody watches."""


async def readiness(http: aiohttp.ClientSession) -> tuple[int, str]:
    async with http.get("/ready") as answer:
        return answer.status, (await answer.json())["status"]


@asynccontextmanager
async def started(
    folder: Path, replicas: int, workers: int = 0, step_ms: int = 0
) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    text = CONFIG.format(replicas=replicas, workers=workers, step_ms=step_ms)
    config = parse_config(text, "test.yaml", folder)
    surroundings = Surroundings(bind("127.0.0.1", 0), None, ProgramStore(folder / "programs"))
    async with (
        Server(config, surroundings, ignore_progress) as server,
        aiohttp.ClientSession(server.url) as http,
    ):
        yield server, http


def test_a_lost_engine_shows_in_ready_until_the_model_is_loaded_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, replicas=1) as (server, http):
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


async def conditions(http: aiohttp.ClientSession) -> tuple[int, list[str]]:
    async with http.get("/ready") as answer:
        found: list[str] = (await answer.json())["models"]["dummy"]
        return answer.status, found


def test_a_model_with_one_replica_left_is_ready_and_each_of_them_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, replicas=2) as (server, http):
            await server.service.models.load_all()
            assert await conditions(http) == (200, ["ready", "ready"])
            _, lost = server.app.replicas(ModelName("dummy"))
            assert lost.pid is not None
            os.kill(lost.pid, signal.SIGKILL)
            while (told := await conditions(http)) == (200, ["ready", "ready"]):
                pass  # asking goes by the loop, so everything else goes on
            assert told == (200, ["ready", "restarting"])
            (listed,) = server.service.models.listing()
            assert listed["state"] == "loaded"
            while await conditions(http) != (200, ["ready", "ready"]):
                pass  # asking goes by the loop, so everything else goes on
            status = await server.service.inspector.status()
            replicas = status.models[0].replicas
            assert [(each.state, each.restarts) for each in replicas] == [("ready", 0), ("ready", 1)]

    asyncio.run(main())


def test_the_loss_of_every_worker_shows_in_ready_until_there_is_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(tmp_path, replicas=1, workers=1) as (server, http):
            await server.service.models.load_all()
            assert await readiness(http) == (200, "ready")
            (lost,) = server.app.worker_pids
            os.kill(lost, signal.SIGKILL)
            while await readiness(http) == (200, "ready"):
                pass  # asking goes by the loop, so everything else goes on
            assert server.app.has_engine(ModelName("dummy"))
            while await readiness(http) != (200, "ready"):
                pass  # asking goes by the loop, so everything else goes on
            assert server.app.worker_pids != [lost]
            assert server.app.worker_restarts == 1

    asyncio.run(main())
