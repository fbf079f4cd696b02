"""Programs on a driver that is loaded already: the rows of `benchmarks.gpu` in which every request is a guest.

The guests are components in WebAssembly text: one hands its loop to the engine, the other asks for each token. Their
input says how long their prompt is, which one, and how much they generate; no two prompts are the same. They wait for
the word and decode side by side, or begin at once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks.engine.stage import Crowd, Decode, configured, decode_of
from benchmarks.gpu_loop import Story
from benchmarks.host_calls import HANDLE_CALLS, HANDLE_IMPORTS, HANDLES, LOCALS
from benchmarks.pie_in_process import Step, WatchedApplication, WatchedDriver, quiet
from pie_core.config.tree import ModelConfig
from pie_core.contracts.driver import Driver, DriverDeclaration
from pie_core.processes.garbage import collect_all
from pie_core.programs import ComponentProgram
from tests.core.sandbox.wat_guests import run, wat_guest

_AREA = 160  # where answers of calls go that nobody reads
_PROMPT = 200_000  # where the prompt's tokens lie
_NUMBERS = ("prompt", "tokens", "index", "vocabulary")  # of the input, in this order
_MORE_LOCALS = " ".join(f"(local ${name} i32)" for name in ("at", "generation", *_NUMBERS))

_READ_NUMBER = """(global $cursor (mut i32) (i32.const 0))
  (func $digit (result i32)
    (global.set $cursor (i32.add (global.get $cursor) (i32.const 1)))
    (i32.sub (i32.load8_u (i32.sub (global.get $cursor) (i32.const 1))) (i32.const 48)))
  (func $number (result i32) (local $value i32) (local $digit i32)
    (loop $skip (br_if $skip (i32.gt_u (local.tee $digit (call $digit)) (i32.const 9))))
    (loop $read
      (local.set $value (i32.add (i32.mul (local.get $value) (i32.const 10)) (local.get $digit)))
      (br_if $read (i32.le_u (local.tee $digit (call $digit)) (i32.const 9))))
    (local.get $value))"""
_READ = "\n  ".join(
    ["(global.set $cursor (local.get $ptr))", *(f"(local.set ${name} (call $number))" for name in _NUMBERS)]
)
_WARM = f"(call $warm (local.get $sampler) (f32.const {{temperature}}) (i32.const {_AREA}))"
_FILL = f"""(drop (memory.grow (i32.const 8)))
  (local.set $at (local.get $prompt))
  (loop $fill
    (local.set $at (i32.sub (local.get $at) (i32.const 1)))
    (i32.store
      (i32.add (i32.const {_PROMPT}) (i32.shl (local.get $at) (i32.const 2)))
      (i32.rem_u
        (i32.add (local.get $index) (i32.mul (local.get $at) (i32.add (local.get $index) (i32.const 1))))
        (local.get $vocabulary)))
    (br_if $fill (local.get $at)))
  (call $append (local.get $context) (i32.const {_PROMPT}) (local.get $prompt) (i32.const {_AREA}))"""
_FLUSH = f"""(call $flush (local.get $context) (i32.const {_AREA}))
  (call $finish (i32.load (i32.const {_AREA + 4})) (i32.const {_AREA}))"""
_WAIT = f"(call $take (call $receive) (i32.const {_AREA}))"
_STEPS = """(loop $again
    (call $step (local.get $context) (local.get $token) (local.get $sampler) (i32.const 120))
    (local.set $token (i32.load (i32.const 124)))
    (br_if $again (local.tee $tokens (i32.sub (local.get $tokens) (i32.const 1)))))"""
_GENERATE = f"""(local.set $generation (call $generation (local.get $context) (local.get $sampler)))
  (call $most (local.get $generation) (local.get $tokens) (i32.const {_AREA}))
  (call $whole (local.get $generation) (i32.const {_AREA}))
  (call $start (local.get $generation) (i32.const {_AREA}))
  (loop $again
    (call $next (local.get $generation) (i32.const {_AREA}))
    (br_if $again (i32.load8_u (i32.const {_AREA + 4}))))"""

_CALLS = [
    *HANDLE_CALLS,
    "context/[method]context.append",
    "context/[method]context.flush",
    "context/[method]pending-flush.finish",
    "session/receive",
    "session/[method]pending-message.take",
    "forward/[method]sampler.temperature",
]
_IMPORTS = (
    HANDLE_IMPORTS
    + """
  (import "host" "[method]context.append" (func $append (param i32 i32 i32 i32)))
  (import "host" "[method]context.flush" (func $flush (param i32 i32)))
  (import "host" "[method]pending-flush.finish" (func $finish (param i32 i32)))
  (import "host" "receive" (func $receive (result i32)))
  (import "host" "[method]pending-message.take" (func $take (param i32 i32)))
  (import "host" "[method]sampler.temperature" (func $warm (param i32 f32 i32)))"""
)
_STEP_IMPORT = '(import "host" "step" (func $step (param i32 i32 i32 i32)))'
_GENERATION = "generate/[constructor]generation"
_GENERATE_CALLS = [
    _GENERATION,
    *(f"generate/[method]generation.{name}" for name in ("max-tokens", "whole", "start", "next")),
]
_GENERATE_IMPORTS = """(import "host" "[constructor]generation" (func $generation (param i32 i32) (result i32)))
  (import "host" "[method]generation.max-tokens" (func $most (param i32 i32 i32)))
  (import "host" "[method]generation.whole" (func $whole (param i32 i32)))
  (import "host" "[method]generation.start" (func $start (param i32 i32)))
  (import "host" "[method]generation.next" (func $next (param i32 i32)))"""


def guest(*, is_offloaded: bool, waits: bool, temperature: float) -> bytes:
    """One that waits has its prompt in its context before. One that does not leaves it to the generation, if any."""
    feeds = [_FLUSH] if waits or not is_offloaded else []
    waiting = [_WAIT] if waits else []
    body = [HANDLES, _READ, _WARM.format(temperature=temperature), _FILL, *feeds, *waiting]
    main = run(
        "\n  ".join([*body, _GENERATE if is_offloaded else _STEPS]), locals_=f"{LOCALS} {_MORE_LOCALS}"
    )
    calls, imports = (
        (_GENERATE_CALLS, _GENERATE_IMPORTS) if is_offloaded else (["forward/step"], _STEP_IMPORT)
    )
    return wat_guest(f"{_READ_NUMBER}\n{main}", [*_CALLS, *calls], _IMPORTS + imports)


class LentApplication(WatchedApplication):
    """A pie around a driver of somebody else's, who closes it."""

    def __init__(self, driver: Driver, depth: int) -> None:
        super().__init__(configured(step_ms=0, depth=depth), quiet)
        self._lent = driver

    def _load_driver(self, declaration: DriverDeclaration, model: ModelConfig) -> Driver:
        self.watched = WatchedDriver(cast(Driver, _Unclosed(self._lent)))
        return cast(Driver, self.watched)


class _Unclosed:
    """A driver that outlives the engine."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> object:
        return getattr(self._driver, name)

    def close(self) -> None:
        """Whoever lent it does that."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Programs from their launch to the end of the last."""

    seconds: float
    steps: list[Step]


async def decode_with_guests(
    driver: Driver,
    guests: int,
    prompt: int,
    tokens: int,
    depth: int,
    *,
    is_offloaded: bool,
    temperature: float = 0.0,
) -> Decode:
    """The steps in which all guests decoded."""
    vocab_size = driver.capabilities.vocab_size
    content = guest(is_offloaded=is_offloaded, waits=True, temperature=temperature)
    with _program(content) as program:
        async with LentApplication(driver, depth) as app:
            crowd = Crowd(app, program, inputs_of([Story(prompt, tokens)] * guests, vocab_size))
            await crowd.ready()
            app.watched.take_steps()
            collect_all()  # what starting programs left, and the pie before this one: up to 0.5 s, in the run or not
            crowd.go()
            await crowd.end()
            return decode_of(app, guests)


async def run_with_guests(
    driver: Driver, stories: Sequence[Story], depth: int, *, is_offloaded: bool, temperature: float = 0.0
) -> Whole:
    """A program for each story, all launched at once; it is compiled before."""
    vocab_size = driver.capabilities.vocab_size
    content = guest(is_offloaded=is_offloaded, waits=False, temperature=temperature)
    with _program(content) as program:
        async with LentApplication(driver, depth) as app:
            await Crowd(app, program, inputs_of([Story(1, 2)], vocab_size)).end()
            app.watched.take_steps()
            collect_all()
            started = time.perf_counter()
            await Crowd(app, program, inputs_of(stories, vocab_size)).end()
            return Whole(time.perf_counter() - started, app.watched.take_steps())


def inputs_of(stories: Sequence[Story], vocab_size: int) -> list[dict[str, int]]:
    """In the order of `_NUMBERS`, in which guests read them."""
    return [
        {
            "prompt": story.prompt,
            "tokens": story.tokens,
            "index": index,
            "vocabulary": vocab_size,
        }
        for index, story in enumerate(stories)
    ]


@contextmanager
def _program(content: bytes) -> Iterator[ComponentProgram]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.wasm"
        path.write_bytes(content)
        yield ComponentProgram("guest", path)
