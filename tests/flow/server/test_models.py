"""Several models at once, loaded and freed while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from pie_core.errors import EngineLost, NotFound, PieError, Unavailable
from tests.flow.server.conftest import Pie

OnServer = Callable[..., Any]

GENERATES = """
    from inferlet import Context, Model, Sampler, session

    async def main(input):
        context = Context(Model.load(input["model"]))
        context.user("Hello")
        context.cue()
        text = await context.generate(Sampler.argmax(), max_tokens=4).collect_text()
        session.send("generated")
        await session.receive()
        context.user("again")
        await context.flush()
        return text
"""
PARAMETERS = 'model = {type = "string"}'


def test_programs_choose_among_several_models(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("generates", GENERATES, parameters=PARAMETERS)
        async with pie.client() as client:
            assert [(each["name"], each["state"]) for each in await client.models()] == [
                ("first", "loaded"),
                ("second", "loaded"),
            ]
            for model in ("first", "second"):
                before = await client.query("model_status")
                process = await client.launch("generates", {"model": model})
                await process.close_input()
                await process.result()
                after = await client.query("model_status")
                used = [name for name in ("first", "second") if _steps(after, name) > _steps(before, name)]
                assert used == [model]
            async with aiohttp.ClientSession(pie.server.url) as http, http.get("/v1/models") as answer:
                assert [each["id"] for each in (await answer.json())["data"]] == ["first", "second"]

    on_server(scenario)


def _steps(status: dict[str, int], name: str) -> int:
    return status[f"{name}.total_batches"]


def test_a_model_that_is_unloaded_takes_its_users_along_and_nobody_else(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("generates", GENERATES, parameters=PARAMETERS)
        async with pie.client() as client:
            first = await client.launch("generates", {"model": "first"})
            second = await client.launch("generates", {"model": "second"})
            for process in (first, second):
                assert (await anext(aiter(process))).value == "generated"
            await client.unload_model("first")
            assert [each["state"] for each in await client.models()] == ["unloaded", "loaded"]
            for process in (first, second):
                await process.signal("go on")
            with pytest.raises(EngineLost):
                await first.result()
            await second.result()
            with pytest.raises(NotFound, match="served are: second"):
                await client.run("generates", {"model": "first"})
            await client.load_model("first")
            third = await client.launch("generates", {"model": "first"})
            await third.signal("go on")
            await third.result()

    on_server(scenario)


def test_a_model_that_is_not_configured_is_refused_with_those_that_are(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            for kind in ("load_model", "unload_model"):
                with pytest.raises(NotFound, match="unknown model `frist`; did you mean `first`"):
                    await client.request(kind, name="frist")

    on_server(scenario)


def test_the_server_is_healthy_at_once_and_ready_once_its_models_are_loaded(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with aiohttp.ClientSession(pie.server.url) as http:
            pie.server.service.models.is_ready = False
            for path, status in (("/health", 200), ("/ready", 503)):
                async with http.get(path) as answer:
                    assert answer.status == status
            async with pie.client() as client:
                with pytest.raises(Unavailable, match=r"its models \(first is loaded, second is loaded\)"):
                    await client.launch("helloworld")
            await pie.server.load_models()
            async with http.get("/ready") as answer:
                models = {"first": ["ready"], "second": ["ready"]}
                assert (answer.status, await answer.json()) == (200, {"status": "ready", "models": models})
            draining = asyncio.create_task(pie.server.service.processes.drain(0))
            await draining
            async with http.get("/ready") as answer:
                assert (answer.status, await answer.json()) == (503, {"status": "stopping", "models": models})
        async with pie.client() as client:
            with pytest.raises(PieError, match="starts no more programs"):
                await client.launch("helloworld")

    on_server(scenario)


def test_metrics_count_what_happened(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            await client.run("text-completion", {"prompt": "Hi", "max_tokens": 3})
            with pytest.raises(NotFound):
                await client.run("no-such-program")
        async with aiohttp.ClientSession(pie.server.url) as http, http.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        for line in (
            "pie_launches_total 1.0",
            'pie_process_ends_total{outcome="returned"} 1.0',
            'pie_requests_total{outcome="not-found",type="launch_process"} 1.0',
            'pie_logins_total{outcome="accepted"} 1.0',
            'pie_kv_pages{group="paged",model="first",replica="0",state="used"} 0.0',
        ):
            assert line in lines

    on_server(scenario)
