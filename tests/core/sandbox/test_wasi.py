"""Streams of our own WASI: what a guest prints is counted, what it reads can be waited for."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.errors import LimitExceeded, PieError, Unsupported
from pie_core.sandbox.converters import Refused
from pie_core.sandbox.hosting import Pending
from pie_core.sandbox.linker import refusal_of
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from pie_core.sandbox.signatures import read_wit
from pie_core.sandbox.wasi import io, registry
from pie_core.sandbox.wasi.streams import ByteSource, OutputBudget, OutputStream, Readable
from tests.core.sandbox.scenarios import State, call, drive
from tests.core.sandbox.wat_guests import RETURN_INPUT, run, wat_guest


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=30)), st.integers(1, 20))
def test_what_is_fed_is_read_in_order_and_then_ends(chunks: list[bytes], count: int) -> None:
    source = ByteSource()
    for chunk in chunks:
        source.feed(chunk)
    source.end()
    seen = b""
    while not source.at_end:
        seen += source.read(count)
    assert seen == b"".join(chunks)
    with pytest.raises(ValueError, match="fed 4 bytes after"):
        source.feed(b"more")
    with pytest.raises(Refused):
        io.read(None, source, 1)  # type: ignore[arg-type]  # the guest is not looked at


def test_a_source_is_ready_when_fed_and_not_ready_when_drained() -> None:
    source = ByteSource()
    readable, told = Readable(source), []
    readable.on_ready(lambda: told.append(1))
    cancel = readable.on_ready(lambda: told.append(2))
    cancel()
    assert not readable.ready()
    source.feed(b"x")
    assert readable.ready()
    assert told == [1]
    source.read(1)
    assert not readable.ready()
    source.end()
    assert readable.ready()
    with pytest.raises(ValueError, match=r"after end\(\)"):
        source.feed(b"y")


def test_outputs_share_one_budget_and_hand_over_what_still_fits() -> None:
    printed: list[bytes] = []
    budget = OutputBudget(10)
    stdout, stderr = (OutputStream(printed.append, budget) for _ in range(2))
    stdout.write(b"12345")
    stderr.write(b"678")
    with pytest.raises(LimitExceeded, match=r"limits\.output_bytes = 10"):
        stdout.write(b"9abc")
    assert printed == [b"12345", b"678", b"9a"]
    with pytest.raises(LimitExceeded):
        stderr.write(b"d")
    assert len(printed) == 3


class SlowState(State):
    """Takes output only when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: Pending[None] = Pending()

    def write_stdout(self, data: bytes) -> Pending[None]:  # type: ignore[override]  # State's returns None
        self.stdout += data
        return self.taken


STREAMS = """
  (import "wasi:io/error@0.2.3" (instance $ioerror (export "error" (type (sub resource)))))
  (alias export $ioerror "error" (type $io_error))
  (import "wasi:io/streams@0.2.3" (instance $streams
    (export "output-stream" (type $output (sub resource)))
    (alias outer 1 $io_error (type $e)) (export "error" (type $error (eq $e)))
    (type $se (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream_error (eq $se)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $output)) (param "contents" (list u8)) (result (result (error $stream_error)))))))
  (alias export $streams "output-stream" (type $output_stream))
  (import "wasi:cli/stdout@0.2.3" (instance $stdout
    (alias outer 1 $output_stream (type $o)) (export "output-stream" (type $output (eq $o)))
    (export "get-stdout" (func (result (own $output))))))
  (core func $get_stdout (canon lower (func $stdout "get-stdout")))
"""
LOWER_WRITE = """(core func $write (canon lower (func $streams "[method]output-stream.blocking-write-and-flush")
  (memory (core memory $libc "memory"))))"""


def printer(times: int) -> bytes:
    body = f"""(local.set $out (call $get))
      (local.set $n (i32.const {times}))
      (loop $more
        (call $write (local.get $out) (local.get $ptr) (local.get $len) (i32.const 200))
        (br_if $more (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))"""
    imports = """(import "host" "get" (func $get (result i32)))
      (import "host" "write" (func $write (param i32 i32 i32 i32)))"""
    return wat_guest(
        run(body, RETURN_INPUT, "(local $out i32) (local $n i32)"),
        core_imports=imports,
        extra=STREAMS,
        extra_lowered=LOWER_WRITE,
        extra_host='(export "get" (func $get_stdout)) (export "write" (func $write))',
    )


def test_a_guest_prints_through_wasi() -> None:
    async def scenario(runtime: Runtime) -> None:
        state = State()
        await call(await Program.load(runtime, printer(3)), "grüße ", state)
        assert state.stdout.decode() == "grüße " * 3

    drive(scenario)


def test_a_sink_that_takes_its_time_holds_only_its_guest_back() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, printer(2))
        slow, quick = SlowState(), State()
        waiting = asyncio.ensure_future(call(program, "one", slow))
        assert await call(program, "two", quick) == "two"
        assert (bytes(slow.stdout), waiting.done()) == (b"one", False)
        slow.taken.resolve(None)
        assert await waiting == "one"
        assert slow.stdout == b"oneone"

    drive(scenario)


def test_a_hundred_megabytes_of_output_end_at_the_limit() -> None:
    async def scenario(runtime: Runtime) -> None:
        state = State()
        with pytest.raises(LimitExceeded, match="output_bytes = 100000"):
            await call(await Program.load(runtime, printer(1000)), "x" * 10_000, state, output_bytes=100_000)
        assert len(state.stdout) == 100_000
        with pytest.raises(PieError):
            await call(await Program.load(runtime, printer(1)), "x" * (100 << 20), State())

    drive(scenario)


def test_every_function_of_our_wasi_has_an_implementation() -> None:
    interfaces = {f"{interface.package}/{interface.name}": interface for interface in registry.IMPLEMENTED}
    assert set(interfaces) == set(registry.wasi_interfaces())
    for path, signature in registry.wasi_interfaces().items():
        assert {function.name for function in signature.functions.values()} == set(
            interfaces[path].functions
        ), path


@pytest.mark.parametrize(
    ("result", "answer"),
    [
        ("list<tuple<string, string>>", []),
        ("option<code>", None),
        ("result<u64, code>", Refused("access-denied")),
        ("result<_, other-code>", Refused("not-supported")),
        ("u64", Unsupported("wasi:files/disk.f is not available to programs on this host")),
    ],
)
def test_refused_interfaces_answer_in_their_own_terms(result: str, answer: object) -> None:
    wit = f"""package wasi:files@0.2.0; interface disk {{
      enum code {{ again, access-denied }} enum other-code {{ again, not-supported }}
      f: func() -> {result};
    }}"""
    function = read_wit([wit])["wasi:files/disk"].functions["f"]
    refusal = refusal_of("wasi:files/disk", function)
    if not isinstance(answer, Exception):
        assert refusal.call(None) == answer
        return
    with pytest.raises(type(answer)) as raised:
        refusal.call(None)
    assert raised.value.args == answer.args
