"""Spans by the OpenTelemetry SDK; the only module that imports it, so it is imported when spans are exported."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from pie_core import __version__
from pie_core.errors import ConfigError
from pie_core.telemetry import traceparent
from pie_core.telemetry.tracing import Attributes, Kind, TraceSettings

_log = logging.getLogger(__name__)

_DELAY_MS = 1000  # spans are exported so long after their end at most, unless many come
_CLOSING_S = 3.0  # less than a worker is given to end
_KINDS = {"server": SpanKind.SERVER, "internal": SpanKind.INTERNAL}


class OpenTelemetrySpan:
    """A span of `telemetry.tracing`."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        context = self._span.get_span_context()
        return traceparent.written(
            context.trace_id, context.span_id, sampled=bool(context.trace_flags & TraceFlags.SAMPLED)
        )

    @property
    def is_recorded(self) -> bool:
        return self._span.is_recording()

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, attributes)

    def fail(self, code: str, message: str) -> None:
        self._span.set_status(Status(StatusCode.ERROR, message))
        self._span.set_attribute("error.type", code)

    def end(self, at_ns: int | None = None) -> None:
        self._span.end(at_ns)


class OpenTelemetry:
    """A Tracing over a provider."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("pie", __version__)

    def start(
        self,
        name: str,
        parent: str | None,
        attributes: Attributes | None = None,
        kind: Kind = "internal",
        at_ns: int | None = None,
    ) -> OpenTelemetrySpan:
        context = trace.set_span_in_context(_span_of(parent))
        return OpenTelemetrySpan(
            self._tracer.start_span(name, context, _KINDS[kind], attributes, start_time=at_ns)
        )

    async def close(self) -> None:
        # A thread that nobody waits for at the end: a collector that hangs must not keep the process.
        closing = threading.Thread(target=self._provider.shutdown, name="pie-traces", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, _CLOSING_S)


def provider_of(settings: TraceSettings, role: str) -> TracerProvider:
    """Exports as the settings say. Raises ModuleNotFoundError for an exporter that is not installed."""
    resource = Resource.create(
        {
            "service.name": "pie",
            "service.version": __version__,
            "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
            "process.pid": os.getpid(),
            "pie.role": role,
        }
    )
    sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
    provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter(settings), schedule_delay_millis=_DELAY_MS))
    return provider


class LineExporter(SpanExporter):
    """Each span as a line of JSON. Several processes may append to one file: a batch is one write at its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        text = "".join(f"{span.to_json(indent=None)}\n" for span in spans)
        try:
            os.write(self._descriptor, text.encode())
        except OSError as error:
            _log.error("%d spans could not be written: %s", len(spans), error)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        os.close(self._descriptor)


def _exporter(settings: TraceSettings) -> SpanExporter:
    if settings.exporter == "console":
        return LineExporter(os.dup(sys.stderr.fileno()))
    if settings.exporter == "file":
        assert settings.file is not None, "the configuration says so"
        return LineExporter(_opened(settings.file))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(settings.endpoint)


def _opened(file: str) -> int:
    """For appending, until the process ends."""
    try:
        return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise ConfigError(f"telemetry.traces.file {file} cannot be written: {error.strerror}") from error


def _span_of(parent: str | None) -> NonRecordingSpan | trace.Span:
    if parent is None:
        return trace.INVALID_SPAN
    trace_id, span_id, sampled = traceparent.numbers_of(parent)
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags))
