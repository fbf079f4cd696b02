"""Which trace something belongs to, as W3C Trace Context writes it: `00-TRACE-SPAN-FLAGS` in hexadecimal digits."""

from __future__ import annotations

import sys

PATTERN = "^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$"

_SAMPLED = 1


def written(trace_id: int, span_id: int, *, sampled: bool) -> str:
    return f"00-{trace_id:032x}-{span_id:016x}-{int(sampled):02x}"


def trace_id_of(traceparent: str) -> str:
    return traceparent.split("-")[1]


def numbers_of(traceparent: str) -> tuple[int, int, bool]:
    """Trace id, span id, and whether the trace is recorded."""
    _, trace_id, span_id, flags = traceparent.split("-")
    return int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & _SAMPLED)


def current() -> str | None:
    """Of the span that is active here; None where nobody has loaded OpenTelemetry, or no span is."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    span = api.get_current_span().get_span_context()
    return written(span.trace_id, span.span_id, sampled=span.trace_flags.sampled) if span.is_valid else None
