"""A request as spans, from its client to the steps that computed it, in one process and over several."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from pie_core.client import SyncClient
from pie_core.errors import GuestError, ProtocolError
from pie_core.telemetry.open_telemetry import OpenTelemetry
from tests.flow.server.conftest import Pie

OnServer = Callable[..., Any]

CLIENTS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
FIVE_TOKENS = {"prompt": "Hi", "max_tokens": 5, "temperature": 0.0}  # a draw may end it before
UNSAMPLED = CLIENTS.removesuffix("01") + "00"

STEPS = """
    from inferlet import Context, Model, Sampler

    async def main(input):
        model = Model.load("first")
        context = Context(model)
        tokens, drawn = model.tokenizer().encode("Hello, this is a prompt"), []
        for _ in range(6):
            forward = context.forward().input(tokens)
            drawing = forward.sample([len(tokens) - 1], Sampler.argmax())
            tokens = (await forward.execute()).tokens_at(drawing)
            drawn += tokens
        context.user("and more")
        await context.flush()
        return len(drawn)
"""
FAILS = """
    async def main(input):
        raise ValueError("no")
"""


class Recorded:
    """Spans that have ended, by name, of one trace."""

    def __init__(self, ratio: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = OpenTelemetry(provider)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        found = self.exporter.get_finished_spans()
        assert len({span.name for span in found}) == len(found), [span.name for span in found]
        return {span.name: span for span in found}

    def parents(self) -> dict[str, str | None]:
        """Of each span by name."""
        names = {_id(span): name for name, span in self.spans.items()}
        return {
            name: None if span.parent is None else names.get(f"{span.parent.span_id:016x}", "the client")
            for name, span in self.spans.items()
        }


def _id(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def _seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def test_a_generation_is_followed_from_its_client_to_its_steps(
    on_server: OnServer, recorded: Recorded
) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            process = await client.launch("text-completion", FIVE_TOKENS, trace=CLIENTS)
            await process.result()
        spans = recorded.spans
        assert recorded.parents() == {
            "program text-completion": "the client",
            "load": "program text-completion",
            "guest": "program text-completion",
            "generate": "guest",
            "engine.generate": "generate",
            "queue": "engine.generate",
            "prefill": "engine.generate",
            "decode": "engine.generate",
        }
        assert {span.context.trace_id for span in spans.values() if span.context} == {
            0x4BF92F3577B34DA6A3CE929D0E0E4736
        }
        server = spans["program text-completion"]
        assert server.kind is trace.SpanKind.SERVER
        assert server.attributes is not None
        assert dict(server.attributes) == {
            "pie.process": process.id,
            "pie.program": "text-completion",
            "pie.user": "alice",
        }
        host, engine, decode = spans["generate"], spans["engine.generate"], spans["decode"]
        assert host.attributes is not None
        assert engine.attributes is not None
        assert decode.attributes is not None
        assert host.attributes["pie.tokens.generated"] == 5
        assert host.attributes["pie.finish_reason"] == engine.attributes["pie.finish_reason"] == "length"
        assert host.attributes["pie.tokens.fed"] == engine.attributes["pie.tokens.fed"]
        assert engine.attributes["pie.model"] == "first"
        assert decode.attributes["pie.steps"] >= 4  # type: ignore[operator]
        assert decode.attributes["pie.batch.mean"] == 1
        assert [event.name for event in host.events] == ["first token"]
        parts = sum(_seconds(spans[name]) for name in ("queue", "prefill", "decode"))
        assert parts <= _seconds(engine) <= _seconds(host) <= _seconds(spans["guest"]) <= _seconds(server)

    on_server(scenario, tracing=recorded.tracing)


def test_a_program_that_steps_by_itself_has_a_span_for_its_prompt_and_none_for_its_tokens(
    on_server: OnServer, recorded: Recorded
) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("steps", STEPS)
        async with pie.client() as client:
            assert await client.run("steps") == 6
        found = [span.name for span in recorded.exporter.get_finished_spans()]
        assert found.count("forward") == found.count("flush") == 1
        assert found.count("engine.forward") == found.count("queue") == found.count("prefill") == 2
        assert len(found) == 11

    on_server(scenario, tracing=recorded.tracing)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_program_launches_belongs_to_its_trace(
    on_server: OnServer, tmp_path: Path, workers: int
) -> None:
    file = tmp_path / "spans.jsonl"
    parent = """
        from inferlet import launch

        async def main(input):
            return await launch("child", {})
    """

    async def scenario(pie: Pie) -> None:
        pie.install("child", "async def main(input):\n    return 7\n")
        pie.install("parent", parent, parameters="[capabilities]\nchildren = 1")
        async with pie.client() as client:
            process = await client.launch("parent", trace=CLIENTS)
            assert await process.result() == 7

    models = "models: [{name: first, driver: {type: dummy}}]"
    traces = f"traces: {{exporter: file, file: '{file}'}}"
    on_server(scenario, models=models, runtime=f"workers: {workers}", telemetry=traces)
    launched, launcher = (
        next(span for span in _lines(file) if span["name"] == f"program {name}")
        for name in ("child", "parent")
    )
    assert launched["parent_id"] == launcher["context"]["span_id"]
    assert launched["context"]["trace_id"] == f"0x{CLIENTS[3:35]}"


def test_what_a_client_does_not_sample_is_not_recorded(on_server: OnServer, recorded: Recorded) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            process = await client.launch("text-completion", {"prompt": "Hi"}, trace=UNSAMPLED)
            await process.result()
        assert recorded.spans == {}

    on_server(scenario, tracing=recorded.tracing)


def test_the_ratio_decides_about_traces_that_begin_here(on_server: OnServer) -> None:
    never = Recorded(0.0)

    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            await client.run("text-completion", {"prompt": "Hi", "max_tokens": 2})
            assert never.spans == {}
            sampled = await client.launch("text-completion", {"prompt": "Hi", "max_tokens": 2}, trace=CLIENTS)
            await sampled.result()
        assert "engine.generate" in never.spans

    on_server(scenario, tracing=never.tracing)


def test_an_error_stands_on_every_span_that_it_ended(on_server: OnServer, recorded: Recorded) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("fails", FAILS)
        async with pie.client() as client:
            with pytest.raises(GuestError):
                await client.run("fails")
        for name in ("program fails", "guest"):
            span = recorded.spans[name]
            assert span.attributes is not None
            assert span.status.status_code is trace.StatusCode.ERROR
            assert span.attributes["error.type"] == "guest"
        assert recorded.spans["load"].status.is_unset

    on_server(scenario, tracing=recorded.tracing)


def test_a_program_that_is_ended_ends_its_spans(on_server: OnServer, recorded: Recorded) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            asked = {"prompt": "Go on", "max_tokens": 20_000, "temperature": 0.0}  # 333 tokens, 1.7 s
            process = await client.launch("text-completion", asked)
            await anext(aiter(process))
            await process.terminate()
            with pytest.raises(GuestError):
                await process.result()
        spans = recorded.spans
        for name in ("program text-completion", "guest"):
            assert spans[name].status.status_code is trace.StatusCode.ERROR, name
        for name in ("generate", "engine.generate"):  # broken off on the program's way out, or failed with it
            attributes = spans[name].attributes
            assert attributes is not None
            assert "cancelled" in (attributes.get("pie.finish_reason"), attributes.get("error.type")), name

    models = "models: [{name: first, driver: {type: dummy, options: {step_ms: 5}}}]"
    on_server(scenario, models=models, tracing=recorded.tracing)


def test_the_span_that_is_active_at_the_client_is_the_parent(on_server: OnServer, recorded: Recorded) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("client")

    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            with tracer.start_as_current_span("asks") as asks:
                await client.run("text-completion", {"prompt": "Hi", "max_tokens": 2})

        def ask() -> Any:
            with tracer.start_as_current_span("asks") as asks, SyncClient(pie.server.socket_url) as client:
                client.launch("text-completion", {"prompt": "Hi", "max_tokens": 2}).result()
            return asks

        also_asks = await asyncio.to_thread(ask)
        servers = [span for span in recorded.exporter.get_finished_spans() if span.name.startswith("program")]
        ids = [span.parent.span_id for span in servers if span.parent is not None]
        assert ids == [each.get_span_context().span_id for each in (asks, also_asks)]

    on_server(scenario, tracing=recorded.tracing)


@pytest.mark.parametrize(
    "wrong", ["", "nonsense", CLIENTS.upper(), "ff" + CLIENTS[2:], "00-" + "0" * 32 + CLIENTS[35:]]
)
def test_a_traceparent_that_is_none_is_refused(on_server: OnServer, wrong: str) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            with pytest.raises(ProtocolError, match="traceparent"):
                await client.request(
                    "launch_process",
                    inferlet="helloworld",
                    input="{}",
                    capture_outputs=False,
                    traceparent=wrong,
                )

    on_server(scenario)


def test_spans_of_all_processes_are_one_tree(on_server: OnServer, tmp_path: Path) -> None:
    file = tmp_path / "spans.jsonl"

    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            process = await client.launch("text-completion", FIVE_TOKENS, trace=CLIENTS)
            await process.result()

    models = "models: [{name: first, driver: {type: dummy}}]"
    traces = f"traces: {{exporter: file, file: '{file}'}}"
    on_server(scenario, models=models, runtime="workers: 1", telemetry=traces)
    spans = {span["name"]: span for span in _lines(file)}
    roles = {name: span["resource"]["attributes"]["pie.role"] for name, span in spans.items()}
    assert roles == {
        "program text-completion": "server",
        **dict.fromkeys(("load", "guest", "generate"), "worker"),
        **dict.fromkeys(("engine.generate", "queue", "prefill", "decode"), "engine"),
    }
    assert len({span["resource"]["attributes"]["process.pid"] for span in spans.values()}) == 3
    assert {span["context"]["trace_id"] for span in spans.values()} == {f"0x{CLIENTS[3:35]}"}
    by_id = {span["context"]["span_id"]: name for name, span in spans.items()}
    assert by_id[spans["guest"]["parent_id"]] == "program text-completion"
    assert by_id[spans["engine.generate"]["parent_id"]] == "generate"


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        yield json.loads(line)


def test_log_lines_of_a_program_tell_its_trace(
    on_server: OnServer, recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pie_core.server.processes")

    async def scenario(pie: Pie) -> None:
        async with pie.client() as client:
            process = await client.launch("text-completion", {"prompt": "Hi", "max_tokens": 2}, trace=CLIENTS)
            await process.result()
            told = [vars(each) for each in caplog.records if re.search(f"{process.id}", each.getMessage())]
            assert len(told) >= 1
            assert {(each["pie_process"], each["pie_trace_id"]) for each in told} == {
                (process.id, CLIENTS[3:35])
            }

    on_server(scenario, tracing=recorded.tracing)
