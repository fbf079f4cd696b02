"""Spans without a server: who may write what about traces, where spans go, and what is said when they cannot."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pie_core.config import Misfit, parse_config
from pie_core.config.tree import TracesConfig
from pie_core.errors import ConfigError
from pie_core.telemetry import traceparent
from pie_core.telemetry.exporting import start_tracing
from pie_core.telemetry.tracing import TraceSettings, spanning

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def spans_in(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_traceparent_is_read_and_written_alike() -> None:
    trace_id, span_id, sampled = traceparent.numbers_of(TRACE)
    assert traceparent.written(trace_id, span_id, sampled=sampled) == TRACE
    assert traceparent.trace_id_of(TRACE) == TRACE[3:35]
    assert not traceparent.numbers_of(TRACE[:-2] + "00")[2]


def test_spans_go_to_a_file_line_by_line_and_what_is_left_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "spans"

    async def main() -> None:
        for name in ("first", "second"):
            tracing = start_tracing(TraceSettings("file", file=str(file)), "server")
            with spanning(tracing, name, TRACE, {"n": 1}) as span:
                assert span is not None
                span.event("half")
            await tracing.close()

    asyncio.run(main())
    first, second = spans_in(file)
    assert (first["name"], second["name"]) == ("first", "second")
    assert first["parent_id"] == f"0x{TRACE[36:52]}"
    assert first["attributes"] == {"n": 1}


def test_an_error_within_a_span_is_noted_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "spans"

    async def main() -> None:
        tracing = start_tracing(TraceSettings("file", file=str(file)), "server")
        with pytest.raises(ConfigError), spanning(tracing, "fails", None):
            raise ConfigError("no")
        await tracing.close()

    asyncio.run(main())
    (span,) = spans_in(file)
    assert span["status"] == {"status_code": "ERROR", "description": "no"}
    assert span["attributes"] == {"error.type": "config"}


def test_without_tracing_a_span_is_nothing() -> None:
    with spanning(None, "x", None) as span:
        assert span is None


def test_a_file_that_cannot_be_written_is_told_with_its_key() -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.traces\.file /no/such/folder/x cannot be written"):
        start_tracing(TraceSettings("file", file="/no/such/folder/x"), "server")


def test_spans_go_to_a_collector_by_otlp() -> None:
    bodies: list[bytes] = []

    async def take(request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        bodies.append(gzip.decompress(body) if request.headers.get("Content-Encoding") == "gzip" else body)
        return web.Response()

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(web.Server(take), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        tracing = start_tracing(TraceSettings("otlp", f"http://127.0.0.1:{port}/v1/traces"), "server")
        with spanning(tracing, "sent", TRACE, {"pie.model": "m"}):
            pass
        await tracing.close()
        server.close()

    asyncio.run(main())
    (resource,) = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans
    about = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (about["service.name"], about["pie.role"]) == ("pie", "server")
    (span,) = resource.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("sent", TRACE[3:35], TRACE[36:52])


def test_a_collector_that_is_not_there_keeps_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)

    async def main() -> float:
        tracing = start_tracing(TraceSettings("otlp", endpoint="http://127.0.0.1:9/v1/traces"), "server")
        with spanning(tracing, "lost", None):
            pass
        begun = time.monotonic()
        await tracing.close()
        return time.monotonic() - begun

    assert asyncio.run(main()) < 9  # what it may take, and what a busy machine adds


def test_a_missing_library_is_told_with_the_extra_that_brings_it() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from pie_core.telemetry.exporting import start_tracing\n"
        "from pie_core.telemetry.tracing import TraceSettings\n"
        "try: start_tracing(TraceSettings('console'), 'server')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(
        "ConfigError telemetry.traces.exporter is console, which needs the module opentel"
    )
    assert "pip install 'pie-core[telemetry]'" in run.stdout


def test_pie_check_tells_that_the_library_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "pie.yaml"
    file.write_text("models: [{name: m, driver: {type: dummy}}]\ntelemetry: {traces: {exporter: otlp}}\n")
    code = (
        "import sys; sys.modules['opentelemetry'] = None; sys.argv = ['pie', 'check', sys.argv[1]]\n"
        "from pie_core.cli import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "pip install 'pie-core[telemetry]'" in run.stderr


def test_nothing_loads_the_library_where_no_spans_are_asked_for() -> None:
    code = "import sys, pie_core.server.server, pie_core.client; print([n for n in sys.modules if 'opentel' in n])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_configuration_of_traces_is_strict(tmp_path: Path) -> None:
    with pytest.raises(Misfit, match="expected a path, because `exporter` is file"):
        TracesConfig(exporter="file")
    for wrong in ("exporter: jaeger", "sample_ratio: 1.5", "ratio: 1"):
        with pytest.raises(ConfigError, match=r"pie.yaml:2: telemetry\.traces"):
            parse_config(f"models: [{{name: m}}]\ntelemetry: {{traces: {{{wrong}}}}}\n", "pie.yaml", tmp_path)
    settled = parse_config(
        "models: [{name: m}]\ntelemetry: {traces: {exporter: file, file: spans}}\n", "pie.yaml", tmp_path
    )
    assert settled.telemetry.traces.file == tmp_path / "spans"
