"""wasi:io: errors, polling and byte streams, on our pollables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pie_core.errors import InvalidRequest
from pie_core.host_api.poll import Pollable, wait_for
from pie_core.sandbox.converters import Case, Refused
from pie_core.sandbox.hosting import Interface, Pending
from pie_core.sandbox.wasi.streams import CHUNK, ByteSource, OutputStream, Readable

if TYPE_CHECKING:
    from pie_core.sandbox.guest import Guest

WIT = """
package wasi:io@0.2.0;

interface error {
  resource error { to-debug-string: func() -> string; }
}

interface poll {
  resource pollable { ready: func() -> bool; block: func(); }
  poll: func(in: list<borrow<pollable>>) -> list<u32>;
}

interface streams {
  use error.{error};
  use poll.{pollable};
  variant stream-error { last-operation-failed(error), closed }
  resource input-stream {
    read: func(len: u64) -> result<list<u8>, stream-error>;
    blocking-read: func(len: u64) -> result<list<u8>, stream-error>;
    skip: func(len: u64) -> result<u64, stream-error>;
    blocking-skip: func(len: u64) -> result<u64, stream-error>;
    subscribe: func() -> pollable;
  }
  resource output-stream {
    check-write: func() -> result<u64, stream-error>;
    write: func(contents: list<u8>) -> result<_, stream-error>;
    blocking-write-and-flush: func(contents: list<u8>) -> result<_, stream-error>;
    flush: func() -> result<_, stream-error>;
    blocking-flush: func() -> result<_, stream-error>;
    subscribe: func() -> pollable;
    write-zeroes: func(len: u64) -> result<_, stream-error>;
    blocking-write-zeroes-and-flush: func(len: u64) -> result<_, stream-error>;
    splice: func(src: borrow<input-stream>, len: u64) -> result<u64, stream-error>;
    blocking-splice: func(src: borrow<input-stream>, len: u64) -> result<u64, stream-error>;
  }
}
"""

T = TypeVar("T")
CLOSED = Case("closed")

error = Interface("error", "wasi:io")
poll = Interface("poll", "wasi:io")
streams = Interface("streams", "wasi:io")


class IoError:
    """Why a stream failed."""

    def __init__(self, text: str) -> None:
        self.text = text


error.resource("error", IoError)
poll.resource("pollable", Pollable)
streams.resource("input-stream", ByteSource)
streams.resource("output-stream", OutputStream)


@error.function("error.to-debug-string")
def to_debug_string(guest: Guest, error: IoError) -> str:
    return error.text


@poll.function("pollable.ready")
def ready(guest: Guest, pollable: Pollable) -> bool:
    return pollable.ready()


@poll.function("pollable.block", suspends=True)
def block(guest: Guest, pollable: Pollable) -> Pending[None]:
    return _after(wait_for([pollable]), lambda: None)


@poll.function("poll", suspends=True)
def poll_several(guest: Guest, pollables: list[Pollable]) -> Pending[list[int]]:
    if not pollables:
        raise InvalidRequest("wasi:io/poll.poll was called with an empty list, which would never return")
    return wait_for(pollables)


@streams.function("input-stream.read")
def read(guest: Guest, source: ByteSource, count: int) -> bytes:
    if source.at_end:
        raise Refused(CLOSED)
    return source.read(count)


@streams.function("input-stream.blocking-read", suspends=True)
def blocking_read(guest: Guest, source: ByteSource, count: int) -> Pending[bytes]:
    return _after(wait_for([Readable(source)]), lambda: read(guest, source, count))


@streams.function("input-stream.skip")
def skip(guest: Guest, source: ByteSource, count: int) -> int:
    return len(read(guest, source, count))


@streams.function("input-stream.blocking-skip", suspends=True)
def blocking_skip(guest: Guest, source: ByteSource, count: int) -> Pending[int]:
    return _after(wait_for([Readable(source)]), lambda: skip(guest, source, count))


@streams.function("input-stream.subscribe")
def subscribe_input(guest: Guest, source: ByteSource) -> Pollable:
    return Readable(source)


@streams.function("output-stream.check-write")
def check_write(guest: Guest, stream: OutputStream) -> int:
    return stream.allowance


@streams.function("output-stream.write")
def write(guest: Guest, stream: OutputStream, contents: bytes) -> None:
    stream.write(contents)


@streams.function("output-stream.blocking-write-and-flush", suspends=True)
def blocking_write(guest: Guest, stream: OutputStream, contents: bytes) -> Pending[None]:
    stream.write(contents)
    return stream.drained()


@streams.function("output-stream.flush")
def flush(guest: Guest, stream: OutputStream) -> None:
    """Nothing is held back here: the sink has it all."""


@streams.function("output-stream.blocking-flush", suspends=True)
def blocking_flush(guest: Guest, stream: OutputStream) -> Pending[None]:
    return stream.drained()


@streams.function("output-stream.subscribe")
def subscribe_output(guest: Guest, stream: OutputStream) -> Pollable:
    return Pollable.of(stream.drained())


@streams.function("output-stream.write-zeroes")
def write_zeroes(guest: Guest, stream: OutputStream, count: int) -> None:
    if count > CHUNK:
        raise InvalidRequest(
            f"output-stream.write-zeroes of {count} bytes: check-write allows at most {CHUNK}"
        )
    stream.write(bytes(count))


@streams.function("output-stream.blocking-write-zeroes-and-flush", suspends=True)
def blocking_write_zeroes(guest: Guest, stream: OutputStream, count: int) -> Pending[None]:
    write_zeroes(guest, stream, count)
    return stream.drained()


@streams.function("output-stream.splice")
def splice(guest: Guest, stream: OutputStream, source: ByteSource, count: int) -> int:
    data = read(guest, source, min(count, stream.allowance))
    stream.write(data)
    return len(data)


@streams.function("output-stream.blocking-splice", suspends=True)
def blocking_splice(guest: Guest, stream: OutputStream, source: ByteSource, count: int) -> Pending[int]:
    return _after(wait_for([Readable(source)]), lambda: splice(guest, stream, source, count))


def _after(waited: Pending[Any], then: Callable[[], T]) -> Pending[T]:
    """Does `then` once `waited` is done; its error is the pending's."""
    answer: Pending[T] = Pending(waited.abandon)
    waited.on_done(lambda: _settle(answer, then))
    return answer


def _settle(answer: Pending[T], then: Callable[[], T]) -> None:
    try:
        answer.resolve(then())
    except Exception as failure:  # travels to the guest: as its result, or as its end
        answer.fail(failure)
