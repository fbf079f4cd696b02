"""How a server does, as its clients and Prometheus see it: one look, the same numbers, nobody else's processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pie_core.client import Client, SyncClient
from pie_core.sandbox.hosting import Pending
from pie_core.server.credentials import DEFAULT_SCOPES, add_api_key
from pie_core.server.metrics import Metrics
from pie_core.server.status import EngineStatus, ModelStatus, ProcessStatus, ServerStatus
from tests.flow.server.conftest import MODELS, Pie
from tests.flow.server.test_top import WAITS, shown

OnServer = Callable[..., Any]

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def started(pie: Pie, client: Client, trace: str | None = None) -> Any:
    """A process that has generated and waits for a message."""
    process = await client.launch("waits", trace=trace)
    assert (await anext(aiter(process))).value == "generated"
    return process


def engine_of(model: ModelStatus) -> EngineStatus:
    (replica,) = model.replicas
    assert replica.engine is not None
    return replica.engine


async def metrics_of(pie: Pie, key: str | None = None) -> dict[str, dict[tuple[str, ...], float]]:
    """Each sample's name, its label values in the order of their names, and its number."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(pie.server.url) as http, http.get("/metrics", headers=headers) as answer:
        assert answer.status == 200
        families = list(text_string_to_metric_families(await answer.text()))
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in families:
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_a_status_tells_what_runs_and_what_it_has(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("waits", WAITS)
        async with pie.client() as client:
            process = await started(pie, client, TRACE)
            status = await client.status()
            assert isinstance(status, ServerStatus)
            assert (status.state, status.running, status.launched, status.connections) == ("ready", 1, 1, 1)
            (running,) = status.processes
            assert (running.id, running.username, running.program) == (process.id, "alice", "waits")
            assert (running.waits_for, running.contexts, running.open_requests) == ("input", 1, 0)
            assert running.attached
            assert running.trace_id == TRACE[3:35]
            assert running.pages > 0
            assert running.tokens > 8
            first, second = status.models
            assert (first.state, first.driver, second.name) == ("loaded", "dummy", "second")
            used, unused = engine_of(first), engine_of(second)
            assert used.first_token_seconds.count == 1
            assert used.between_tokens_seconds.count == 7
            assert used.batch_sizes.count == used.steps > unused.steps == 0
            (group,) = used.groups
            assert 0 < group.used <= group.total
            assert any(each.name == "dummy" for each in status.plugins)
            (worker,) = status.workers
            assert worker.processes == 1
            assert worker.resumes is not None
            assert worker.resumes > 0
            await process.signal("go on")
            await process.result()
            status = await client.status()
            assert (status.running, status.processes, status.ended) == (0, [], {"returned": 1})

    on_server(scenario)


def test_users_see_their_own_processes_and_an_observer_everybodys(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("waits", WAITS)
        keys = {
            user: add_api_key(pie.credentials_file, user, "k", DEFAULT_SCOPES, None)
            for user in ("alice", "bob")
        }
        keys["olga"] = add_api_key(pie.credentials_file, "olga", "k", ("metrics", "observe"), None)
        clients = {user: Client(pie.server.socket_url, api_key=key) for user, key in keys.items()}
        async with clients["alice"], clients["bob"], clients["olga"]:
            started_by = {user: await started(pie, clients[user]) for user in ("alice", "bob")}
            seen = {user: (await client.status()).processes for user, client in clients.items()}
            assert [_owner(each) for each in seen["alice"]] == [("alice", started_by["alice"].id)]
            assert [_owner(each) for each in seen["bob"]] == [("bob", started_by["bob"].id)]
            assert {user for user, _ in map(_owner, seen["olga"])} == {"alice", "bob"}
            for process in started_by.values():
                await process.signal("go on")
                await process.result()

    on_server(scenario, auth="enabled: true")


def _owner(process: ProcessStatus) -> tuple[str, str]:
    return process.username, process.id


def test_metrics_and_status_tell_the_same(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            await client.run("text-completion", {"prompt": "Hi", "max_tokens": 5, "temperature": 0.0})
            status, metrics = await client.status(), await metrics_of(pie)
            engine = engine_of(status.models[0])
            for name, value in (
                ("pie_steps_total", engine.steps),
                ("pie_passes_total", engine.passes),
                ("pie_tokens_total", engine.tokens),
                ("pie_sampled_tokens_total", engine.sampled_tokens),
                ("pie_batch_size_count", engine.steps),
                ("pie_batch_size_sum", engine.passes),
                ("pie_time_to_first_token_seconds_count", 1),
                ("pie_time_between_tokens_seconds_count", 4),
                ("pie_prefix_lookup_tokens_total", engine.prefix_lookup_tokens),
                ("pie_model_up", 1),
                ("pie_engine_restarts_total", 0),
            ):
                assert metrics[name]["first", "0"] == value, name
            phases = metrics["pie_step_phase_seconds_total"]
            assert phases["first", "driver", "0"] == engine.driver_s
            assert phases["first", "schedule", "0"] > 0 < phases["first", "deliver", "0"]
            states = ("used", "cached", "free")
            pages = [metrics["pie_kv_pages"][engine.groups[0].name, "first", "0", state] for state in states]
            assert sum(pages) == engine.groups[0].total
            assert metrics["pie_launches_total"][()] == metrics["pie_process_ends_total"]["returned",] == 1
            assert metrics["pie_processes"][()] == 0
            assert metrics["pie_plugin_load_seconds"]["dummy",] > 0
            assert metrics["pie_guest_resumes_total"]["0",] > 0
            assert metrics["pie_host_calls_total"]["0",] > 10
            assert metrics["pie_ready"][()] == 1
            assert metrics["process_resident_memory_bytes"][()] > 0

    on_server(scenario)


def test_buckets_count_everything_up_to_their_bound(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            await client.run("text-completion", {"prompt": "Hi", "max_tokens": 3})
        buckets = (await metrics_of(pie))["pie_batch_size_bucket"]
        counts = [count for (_, model, _), count in buckets.items() if model == "first"]
        assert counts == sorted(counts)
        assert buckets["1.0", "first", "0"] == buckets["+Inf", "first", "0"] == counts[-1] > 0

    on_server(scenario)


def test_every_metric_that_is_exposed_is_documented_and_the_other_way_round(on_server: OnServer) -> None:
    described = {each.name: each for each in Metrics().described()}
    assert all(each.help.endswith(".") for each in described.values())

    async def scenario(pie: Pie) -> None:
        async with aiohttp.ClientSession(pie.server.url) as http, http.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        ours = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE pie_")}
        created = {name for name in ours if name.endswith("_created")}  # prometheus_client's own
        assert {name: kind for name, kind in ours.items() if name not in created} == {
            name: each.kind for name, each in described.items()
        }

    on_server(scenario)


def test_an_engine_that_does_not_answer_is_left_out_and_nobody_waits(
    on_server: OnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pie_core.server.inspection.PATIENCE_S", 0.05)

    async def scenario(pie: Pie) -> None:
        engine = pie.server.app.models[next(iter(pie.server.app.models))].engine
        with monkeypatch.context() as patch:
            patch.setattr(engine, "request", lambda build, take: Pending[None]())
            async with pie.client() as client, asyncio.timeout(5):
                first, second = (await client.status()).models
                assert first.replicas[0].engine is None
                assert second.replicas[0].engine is not None
                up = (await metrics_of(pie))["pie_model_up"]
                assert (up["first", "0"], up["second", "0"]) == (0, 1)

    on_server(scenario)


def test_the_synchronous_client_asks_as_well(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        def ask() -> ServerStatus:
            with SyncClient(pie.server.socket_url, username="alice") as client:
                return client.status()

        assert [each.name for each in (await asyncio.to_thread(ask)).models] == ["first", "second"]

    on_server(scenario)


def test_engine_and_worker_processes_are_told_apart(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            status = await client.status()
            (replica,) = status.models[0].replicas
            assert replica.pid is not None
            assert replica.resident_bytes is not None
            assert replica.resident_bytes > 1 << 20
            assert len(status.workers) == 2
            assert len({replica.pid, *(worker.pid for worker in status.workers)}) == 3
            metrics = await metrics_of(pie)
            names = set(metrics["pie_child_cpu_seconds_total"])
            assert names == {("first 0", "engine"), ("0", "worker"), ("1", "worker")}

    models = MODELS.splitlines()
    on_server(scenario, models="\n".join(models[:3]), runtime="workers: 2")


@pytest.mark.slow
def test_every_replica_of_a_model_counts_for_itself(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            await asyncio.gather(
                *(client.run("text-completion", {"prompt": f"{n}", "max_tokens": 4}) for n in range(4))
            )
            first, second = (await client.status()).models[0].replicas
            assert first.pid != second.pid
            steps = [each.engine.steps for each in (first, second) if each.engine is not None]
            assert min(steps) > 0
            metrics = await metrics_of(pie)
            assert [metrics["pie_steps_total"]["first", str(place)] for place in (0, 1)] == steps
            lines = shown(await client.status(), None, 80, 40)
            assert [line for line in lines if "replica" in line] == ["  replica 0", "  replica 1"]

    models = "models: [{name: first, driver: {type: dummy}, replicas: 2}]"
    on_server(scenario, models=models, runtime="engine_process: true")


@pytest.mark.slow
def test_what_is_lost_and_replaced_is_counted(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            (replica,) = (await client.status()).models[0].replicas
            assert replica.pid is not None
            os.kill(replica.pid, signal.SIGKILL)
            back = await _until(client, lambda status: status.models[0].replicas[0].restarts == 1)
            assert back.models[0].replicas[0].pid != replica.pid
            (worker,) = back.workers
            os.kill(worker.pid, signal.SIGKILL)
            back = await _until(
                client, lambda status: status.worker_restarts == 1 and len(status.workers) == 1
            )
            assert back.workers[0].pid != worker.pid
            await client.run("text-completion", {"prompt": "Hi", "max_tokens": 2})
        metrics = await metrics_of(pie)
        assert metrics["pie_engine_restarts_total"]["first", "0"] == 1
        assert metrics["pie_worker_restarts_total"][()] == 1

    on_server(scenario, models="models: [{name: first, driver: {type: dummy}}]", runtime="workers: 1")


async def _until(client: Client, holds: Callable[[ServerStatus], bool]) -> ServerStatus:
    for _ in range(1200):
        status = await client.status()
        if holds(status):
            return status
        await asyncio.sleep(0.05)
    raise AssertionError(f"it never came to be: {status}")
