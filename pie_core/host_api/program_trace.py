"""The host calls of one program as spans, while its trace is recorded: they end when the engine has answered."""

from __future__ import annotations

from typing import TypeVar

from pie_core.engine.messages import Answer, Failed, Generated
from pie_core.errors import Cancelled
from pie_core.host_api.engine_client import Stream
from pie_core.sandbox.hosting import Pending
from pie_core.telemetry.tracing import Attributes, Span, Tracing

T = TypeVar("T")


class ProgramTrace:
    """Begins spans under that of the guest."""

    def __init__(self, tracing: Tracing, guest: Span) -> None:
        self._tracing = tracing
        self._parent = guest.traceparent

    def begin(self, name: str, attributes: Attributes) -> Span:
        return self._tracing.start(name, self._parent, attributes)


def until_done(span: Span, pending: Pending[T]) -> None:
    """Ends the span with what the program waits for, or when it no longer does."""
    on_abandon = pending.on_abandon

    def end() -> None:
        if pending.error is not None:
            span.fail(getattr(pending.error, "code", "error"), str(pending.error))
        span.end()

    def give_up() -> None:
        span.fail(Cancelled.code, "the program did not wait for it")
        span.end()
        if on_abandon is not None:
            on_abandon()

    pending.on_done(end)
    pending.on_abandon = give_up


class TracedStream:
    """A Stream that also notes when the first token and the end came."""

    def __init__(self, span: Span, stream: Stream) -> None:
        self._span = span
        self._stream = stream
        self._tokens = 0

    def hear(self, event: Answer) -> None:
        self._stream.hear(event)
        if isinstance(event, Failed):
            self._span.fail(event.code, event.message)
            self._span.end()
        elif isinstance(event, Generated) and event.finish is None:
            self._count(len(event.tokens))
        elif isinstance(event, Generated):
            tokens = self._tokens + len(event.tokens)
            self._span.note({"pie.tokens.generated": tokens, "pie.finish_reason": event.finish or ""})
            self._span.end()

    def drew(self, token: int, length: int) -> None:
        self._stream.drew(token, length)
        self._count(1)

    def _count(self, tokens: int) -> None:
        if not self._tokens and tokens:
            self._span.event("first token")
        self._tokens += tokens
