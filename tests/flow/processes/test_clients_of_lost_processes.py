"""What a client on the network hears when the process is lost in which its program, or its model, was running."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pie_core.client import Client
from pie_core.errors import EngineLost, PieError, WorkerLost
from pie_core.ids import ModelName
from pie_core.server.server import Server
from tests.flow.processes.test_engine_process import until
from tests.flow.processes.test_ready import started

pytestmark = pytest.mark.slow

LONG = {"prompt": "Hi", "max_tokens": 100_000, "temperature": 0.0}  # 256 tokens until its stop token
STEP_MS = 20


def a_worker(server: Server) -> int:
    return server.app.worker_pids[0]


def the_engine(server: Server) -> int:
    pid = server.app.engine_pid(ModelName("dummy"))
    assert pid is not None
    return pid


def _is_replaced(server: Server) -> bool:
    (engine,) = server.app.replicas(ModelName("dummy"))
    return engine.restarts + server.app.worker_restarts == 1


@pytest.mark.parametrize(
    ("victim", "error", "says"),
    [
        pytest.param(a_worker, WorkerLost, "program 'text-completion' ran in worker process", id="worker"),
        pytest.param(the_engine, EngineLost, "its engine process", id="engine"),
    ],
)
def test_a_client_is_told_by_type_and_what_it_launches_next_runs(
    tmp_path: Path, victim: Callable[[Server], int], error: type[PieError], says: str
) -> None:
    async def main() -> None:
        async with started(tmp_path, replicas=1, workers=1, step_ms=STEP_MS) as (server, _):
            await server.load_models()
            async with Client(server.socket_url, username="alice") as client:
                process = await client.launch("text-completion", LONG)
                await anext(aiter(process))  # it has begun to say something
                os.kill(victim(server), signal.SIGKILL)
                with pytest.raises(error, match=says):
                    await process.result()
                await until(lambda: _is_replaced(server))
                await until(lambda: server.service.models.can_compute)
                again = {"prompt": "Hi", "max_tokens": 4}
                await client.run("text-completion", again)

    asyncio.run(main())
