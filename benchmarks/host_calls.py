"""What crossing the boundary between a guest and its host costs.

    python -m benchmarks.host_calls [--json FILE] [--python COMPONENT]

Scalar calls, suspending steps of many guests, strings of three sizes, launches, and memory per suspended guest.
Times are the best of several rounds; the ratios compare with wasmtime-py's public call path, timed in the same run.
A turn is a step of a program's own loop through the real host API, by an engine that answers at once and whose own time
is taken off: what a worker pays for a guest and token, in CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import wasmtime
from wasmtime.component import Component, Linker

from pie_core.engine.messages import (
    Command,
    Event,
    EventSink,
    Forward,
    ForwardDone,
    ModelInfo,
    Stepped,
    Steps,
)
from pie_core.host_api import poll
from pie_core.host_api.engine_client import EngineClient
from pie_core.host_api.guest_state import ProgramState, ServedModel, served_model
from pie_core.host_api.interfaces import INTERFACES
from pie_core.ids import ContextId, ModelName, ProcessId, Tenant
from pie_core.sandbox.guest import Guest
from pie_core.sandbox.hosting import Interface, Pending
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.program import Program
from pie_core.sandbox.quick_calls import built_library
from pie_core.sandbox.runtime import Runtime
from pie_core.sandbox.signatures import our_interfaces
from pie_core.testing.recording_client import RecordingClient
from pie_core.text.text_model import load_text
from pie_plugins.drivers.dummy import CHECKPOINT
from tests.core.sandbox.wat_guests import RETURN_NONE, run, wat_guest

PYTHON_GUEST = Path(__file__).parent.parent / "pie_core" / "guests" / "python.wasm"
ROUNDS = 3
LONG = Limits(cpu_seconds_per_resume=300.0)
MIB = 1 << 20

PUBLIC_PATH = """(component
  (import "ping" (func $ping (param "x" u32) (result u32)))
  (core func $ping (canon lower (func $ping)))
  (core module $m (import "h" "ping" (func $f (param i32) (result i32)))
    (func (export "run") (param i32) (result i32) (local i32)
      (loop $l (local.set 1 (call $f (local.get 1)))
       (br_if $l (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))))
      (local.get 1)))
  (core instance $i (instantiate $m (with "h" (instance (export "ping" (func $ping))))))
  (func (export "run") (param "n" u32) (result u32) (canon lift (core func $i "run"))))"""


class State:
    """The least that a guest needs."""

    name = "benchmark"
    tenant = "benchmark"

    def write_stdout(self, data: bytes) -> None: ...

    def write_stderr(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class Thing:
    """Stands for a model, a context or a sampler."""


class Engine:
    """Resolves all steps that are waiting in one callback of the loop, as a finished batch would."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Pending[int], int]] = []

    def step(self, guest: State, context: Thing, token: int, sampler: Thing) -> Pending[int]:
        pending: Pending[int] = Pending()
        if not self.waiting:
            asyncio.get_running_loop().call_soon(self.finish)
        self.waiting.append((pending, token))
        return pending

    def finish(self) -> None:
        batch, self.waiting = self.waiting, []
        for pending, token in batch:
            pending.resolve(token + 1)


def stand_ins(engine: Engine, text: str) -> list[Interface]:
    """Just enough of the host API to be called."""
    model, context, forward, session = (
        Interface(name) for name in ("model", "context", "forward", "session")
    )
    for interface, resource in ((model, "model"), (context, "context"), (forward, "sampler")):
        interface.resource(resource, Thing)
    model.function("model.load")(lambda guest, name: Thing())
    model.function("model.describe")(lambda guest, model: text)
    context.function("context.create")(lambda guest, model: Thing())
    forward.function("[constructor]sampler")(lambda guest: Thing())
    forward.function("step", suspends=True)(engine.step)
    session.function("send")(lambda guest, message: None)
    given = {interface.name: interface for interface in (poll.interface, model, context, forward, session)}
    return [_completed(given.get(name) or Interface(name), name) for name in _names()]


def _names() -> list[str]:
    return [path.partition("/")[2] for path in our_interfaces()]


def _completed(interface: Interface, name: str) -> Interface:
    """With the functions that nothing here calls, so that the generic Python guest links."""
    for function in our_interfaces()[f"inferlet:api/{name}"].functions.values():
        if function.name not in interface.functions:
            interface.function(function.name)(lambda guest, *arguments: None)
    return interface


def loop(count: int, instructions: str) -> str:
    return f"""(local.set $n (i32.const {count}))
      (loop $again {instructions}
        (br_if $again (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))"""


HANDLES = """(call $load (i32.const 0) (i32.const 0) (i32.const 100))
  (local.set $model (i32.load (i32.const 104)))
  (call $create (local.get $model) (i32.const 100))
  (local.set $context (i32.load (i32.const 104)))
  (local.set $sampler (call $sampler))"""
LOCALS = "(local $n i32) (local $model i32) (local $context i32) (local $sampler i32) (local $token i32)"
HANDLE_CALLS = ["model/[static]model.load", "context/[static]context.create", "forward/[constructor]sampler"]
HANDLE_IMPORTS = """(import "host" "[static]model.load" (func $load (param i32 i32 i32)))
  (import "host" "[static]context.create" (func $create (param i32 i32)))
  (import "host" "[constructor]sampler" (func $sampler (result i32)))"""


def scalar_guest(count: int) -> bytes:
    return wat_guest(
        run(loop(count, "(drop (call $now))"), locals_=LOCALS),
        ["poll/now-ns"],
        '(import "host" "now-ns" (func $now (result i64)))',
    )


def step_guest(count: int) -> bytes:
    step = """(call $step (local.get $context) (local.get $token) (local.get $sampler) (i32.const 120))
      (local.set $token (i32.load (i32.const 124)))"""
    return wat_guest(
        run(HANDLES + loop(count, step), locals_=LOCALS),
        [*HANDLE_CALLS, "forward/step"],
        HANDLE_IMPORTS + '(import "host" "step" (func $step (param i32 i32 i32 i32)))',
    )


def send_guest(count: int, size: int) -> bytes:
    grow = f"(drop (memory.grow (i32.const {size // 65536 + 1})))"
    send = f"(call $send (i32.const 131072) (i32.const {size}) (i32.const 100))"
    return wat_guest(
        run(grow + loop(count, send), locals_=LOCALS),
        ["session/send"],
        '(import "host" "send" (func $send (param i32 i32 i32)))',
    )


def describe_guest(count: int) -> bytes:
    describe = "(call $describe (local.get $model) (i32.const 100))"
    return wat_guest(
        run(HANDLES + loop(count, describe), locals_=LOCALS),
        [*HANDLE_CALLS, "model/[method]model.describe"],
        HANDLE_IMPORTS + '(import "host" "[method]model.describe" (func $describe (param i32 i32)))',
    )


def sleeping_guest() -> bytes:
    sleep = "(call $wait (i32.const 0) (i32.const 0) (i32.const 1) (i64.const 3600000000000) (i32.const 100))"
    return wat_guest(
        run(sleep), ["poll/wait"], '(import "host" "wait" (func $wait (param i32 i32 i32 i64 i32)))'
    )


def _state(process: str, models: Mapping[ModelName, ServedModel]) -> ProgramState:
    return ProgramState(ProcessId(process), "user", Tenant("t"), models, RecordingClient())


def empty_guest() -> bytes:
    return wat_guest(run("", RETURN_NONE))


class InstantEngine:
    """An EnginePort that draws tokens when the loop comes round; `cpu_s` is what it needs for that itself."""

    info = ModelInfo("instant", "none", "none", 512, 1 << 20, 16, frozenset())
    is_ready = True

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self._sent: list[Command] = []
        self._build: Callable[[], Command | None] = lambda: None
        self._lengths: dict[ContextId, int] = {}
        self._sink: EventSink

    def listen(self, sink: EventSink) -> None:
        self._sink = sink

    def send(self, command: Command) -> None:
        if not self._sent:
            asyncio.get_running_loop().call_soon(self._answer)
        self._sent.append(command)

    def send_last(self, build: Callable[[], Command | None]) -> None:
        self._build = build
        asyncio.get_running_loop().call_soon(self._answer)

    def step_now(self, context: ContextId, token: int) -> None:
        """Nothing is known at once."""

    def hurry(self) -> None:
        """Answers take their time, as those of a driver do."""

    async def close(self) -> None: ...

    def _answer(self) -> None:
        begin = time.thread_time()
        sent, self._sent = self._sent, []
        last = self._build()
        events = [event for each in sent if (event := self._answered(each)) is not None]
        if isinstance(last, Steps):
            events.append(self._stepped(last))
        self.cpu_s += time.thread_time() - begin
        self._sink(events)

    def _answered(self, command: Command) -> Event | None:
        if isinstance(command, Steps):
            return self._stepped(command)
        if isinstance(command, Forward):
            length = self._lengths.get(command.context, 0) + len(command.tokens)
            self._lengths[command.context] = length
            return ForwardDone(command.request, [1], [], length, length)
        return None

    def _stepped(self, steps: Steps) -> Stepped:
        lengths = [self._lengths[context] + 1 for context in steps.contexts]
        self._lengths.update(zip(steps.contexts, lengths, strict=True))
        return Stepped(steps.requests, steps.tokens, lengths, lengths)


class Bench:
    def __init__(self, cache: Path) -> None:
        self.engine = Engine()
        self.cache = cache
        self.rows: dict[str, float] = {}

    def runtime(self, text: str = "") -> Runtime:
        return Runtime(stand_ins(self.engine, text), self.cache)

    async def per_call(self, wasm: bytes, count: int, guests: int = 1, text: str = "") -> float:
        """Microseconds for each of `count` calls of each guest."""
        runtime = self.runtime(text)
        program = await Program.load(runtime, wasm)
        best = min([await self._round(program, guests) for _ in range(ROUNDS)])
        runtime.close()
        return best / (count * guests) * 1e6

    async def _round(self, program: Program, guests: int) -> float:
        started = [program.start(State(), LONG) for _ in range(guests)]
        gc.collect()
        begin = time.perf_counter()
        await asyncio.gather(*(guest.call("run", "") for guest in started))
        took = time.perf_counter() - begin
        for guest in started:
            guest.close()
        return took

    async def calls(self) -> None:
        self.rows["scalar call, public wasmtime-py path, us"] = public_path(20_000)
        self.rows["scalar call, us"] = await self.per_call(scalar_guest(50_000), 50_000)
        for guests in (1, 32, 256):
            count = 20_000 // guests
            self.rows[f"suspending step, {guests} guests, us"] = await self.per_call(
                step_guest(count), count, guests
            )
        public = self.rows["scalar call, public wasmtime-py path, us"]
        self.rows["ratio scalar call / public path"] = self.rows["scalar call, us"] / public

    async def turns(self) -> None:
        for guests in (1, 32, 256, 1000):
            count = max(30, 30_000 // guests)
            for label, library in (("", None), (", with quick calls", built_library())):
                if library is not None or not label:
                    row = f"turn of a loop, {guests} guests{label}, us of CPU"
                    self.rows[row] = await self._turn(guests, count, library)

    async def _turn(self, guests: int, count: int, library: Path | None = None) -> float:
        """Microseconds for each of `count` turns of each guest, without what a guest needs for its first."""
        runtime, times = Runtime(INTERFACES, self.cache, quick_calls=library), []
        for calls in (count, 1):
            program = await Program.load(runtime, step_guest(calls))
            times.append(min([await self._loops(runtime, program, guests) for _ in range(ROUNDS)]))
        runtime.close()
        return (times[0] - times[1]) / ((count - 1) * guests) * 1e6

    async def _loops(self, runtime: Runtime, program: Program, guests: int) -> float:
        engine = InstantEngine()
        text = load_text(CHECKPOINT, engine.info.vocab_size)
        models = {
            ModelName("m"): served_model(ModelName("m"), [EngineClient(engine, programs=runtime.pump)], text)
        }
        states = [_state(f"p{place}", models) for place in range(guests)]
        started = [program.start(state, LONG) for state in states]
        gc.collect()
        begin = time.thread_time()
        await asyncio.gather(*(guest.call("run", "") for guest in started))
        took = time.thread_time() - begin - engine.cpu_s
        for guest in started:
            guest.close()
        return took

    async def strings(self) -> None:
        for label, size in (("1 kB", 1_000), ("100 kB", 100_000), ("1 MB", 1_000_000)):
            count = max(5, min(2_000, 10_000_000 // size))
            sent = await self.per_call(send_guest(count, size), count)
            received = await self.per_call(describe_guest(count), count, text="x" * size)
            self.rows[f"string of {label} guest to host, us"] = sent
            self.rows[f"string of {label} host to guest, us"] = received

    async def launches(self, label: str, wasm: bytes, prepare: Callable[[Guest], Awaitable[Any]]) -> None:
        runtime = self.runtime()
        await Program.load(runtime, wasm)
        begin = time.perf_counter()
        program = await Program.load(runtime, wasm)
        self.rows[f"{label}: load from the cache, ms"] = (time.perf_counter() - begin) * 1e3
        times = sorted([await _launch(program, prepare) for _ in range(60)])
        self.rows[f"{label}: launch and run to the end, p50, ms"] = times[len(times) // 2] * 1e3
        self.rows[f"{label}: launch and run to the end, p95, ms"] = times[int(len(times) * 0.95)] * 1e3
        runtime.close()

    async def memory(self, label: str, wasm: bytes, prepare: Callable[[Guest], Awaitable[Any]]) -> None:
        for count in (100, 1000):
            runtime = self.runtime()
            program = await Program.load(runtime, wasm)
            before = resident()
            tasks = [asyncio.ensure_future(_sleep(program.start(State()), prepare)) for _ in range(count)]
            await asyncio.sleep(1.0 + count / 200)  # until all of them wait
            self.rows[f"{label}: memory of each of {count} suspended guests, kB"] = (
                (resident() - before) / count / 1e3
            )
            runtime.close()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _launch(program: Program, prepare: Callable[[Guest], Awaitable[Any]]) -> float:
    begin = time.perf_counter()
    async with program.start(State()) as guest:
        await prepare(guest)
        await guest.call("run", "{}")
    return time.perf_counter() - begin


async def _sleep(guest: Guest, prepare: Callable[[Guest], Awaitable[Any]]) -> None:
    await prepare(guest)
    await guest.call("run", "{}")


async def nothing(guest: Guest) -> None:
    """A component of its own needs no preparation."""


def source(text: str) -> Callable[[Guest], Awaitable[Any]]:
    return lambda guest: guest.call("load", [("main.py", text)], "main.py")


def public_path(count: int) -> float:
    """Microseconds per call through wasmtime-py's documented host functions."""
    engine = wasmtime.Engine()
    linker = Linker(engine)
    with linker.root() as root:
        root.add_func("ping", lambda store, x: x)
    store = wasmtime.Store(engine)
    function = linker.instantiate(store, Component(engine, PUBLIC_PATH)).get_func(store, "run")
    assert function is not None
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        function(store, count)
        times.append(time.perf_counter() - begin)
    return min(times) / count * 1e6


def resident() -> int:
    """Bytes of memory that this process takes; pages mapped by several guests count once."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


async def measure(python_guest: bytes | None, cache: Path) -> dict[str, float]:
    bench = Bench(cache)
    await bench.calls()
    await bench.turns()
    await bench.strings()
    await bench.launches("WAT guest", empty_guest(), nothing)
    await bench.memory("WAT guest", sleeping_guest(), nothing)
    if python_guest is not None:
        await bench.launches(
            "Python guest", python_guest, source("async def main(input):\n    return None\n")
        )
        await bench.memory(
            "Python guest",
            python_guest,
            source("import time\nasync def main(input):\n    time.sleep(3600)\n"),
        )
    return bench.rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_calls", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--python", type=Path, default=PYTHON_GUEST, help="the generic Python guest")
    arguments = parser.parse_args()
    logging.basicConfig()
    with tempfile.TemporaryDirectory() as cache:
        python_guest = arguments.python.read_bytes() if arguments.python.exists() else None
        rows = asyncio.run(measure(python_guest, Path(cache)))
    for label, value in rows.items():
        print(f"{label:<64} {value:>12.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
