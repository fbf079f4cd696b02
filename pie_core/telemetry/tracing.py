"""Spans of requests, for whoever has them exported; where nobody has, there is no Tracing and nothing asks for one.

    client's span ─ program ┬ load
                            └ guest ┬ generate ─ engine.generate ─ queue, prefill, decode
                                    └ forward ── engine.forward ── queue, prefill

Each process exports its own; a `traceparent` in the messages between them says what belongs together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import msgspec

Value = str | bool | int | float
Attributes = Mapping[str, Value]
Kind = Literal["server", "internal"]


class TraceSettings(msgspec.Struct, frozen=True):
    """Where spans go; crosses to the processes that pie starts."""

    exporter: Literal["otlp", "console", "file"]
    endpoint: str | None = None
    file: str | None = None
    sample_ratio: float = 1.0


class Span(Protocol):
    """Something that takes a while. `traceparent` makes others its children."""

    @property
    def traceparent(self) -> str: ...

    @property
    def is_recorded(self) -> bool:
        """False: its trace was not sampled, so nothing need be noted."""

    def note(self, attributes: Attributes) -> None: ...

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something that happens in it, now."""

    def fail(self, code: str, message: str) -> None: ...

    def end(self, at_ns: int | None = None) -> None:
        """Once; now, or at a time as `time.time_ns` tells it."""


class Tracing(Protocol):
    """The spans of one process."""

    def start(
        self,
        name: str,
        parent: str | None,
        attributes: Attributes | None = None,
        kind: Kind = "internal",
        at_ns: int | None = None,
    ) -> Span:
        """Begins now, or at a time as `time.time_ns` tells it. Without a parent it begins a trace."""

    async def close(self) -> None:
        """Exports what is left, for a few seconds at most."""


@contextmanager
def spanning(
    tracing: Tracing | None,
    name: str,
    parent: str | None,
    attributes: Attributes | None = None,
    kind: Kind = "internal",
) -> Iterator[Span | None]:
    """Around what it is the span of; None, and nothing happens, without tracing."""
    if tracing is None:
        yield None
        return
    span = tracing.start(name, parent, attributes, kind)
    try:
        yield span
    except BaseException as error:
        span.fail(getattr(error, "code", type(error).__name__), str(error))
        raise
    finally:
        span.end()
