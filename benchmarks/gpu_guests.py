"""Programs on a driver that is loaded already: the rows of `benchmarks.gpu` in which every request is a guest.

The guests are components in WebAssembly text: one hands its loop to the engine, the other asks for each token. All feed
a prompt of their own, wait for the word, and then decode side by side.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

from benchmarks.engine.stage import Crowd, Decode, configured, decode_of
from benchmarks.host_calls import HANDLE_CALLS, HANDLE_IMPORTS, HANDLES, LOCALS, loop
from benchmarks.pie_in_process import WatchedApplication, WatchedDriver, quiet
from pie_core.config.tree import ModelConfig
from pie_core.contracts.driver import Driver, DriverDeclaration
from pie_core.programs import ComponentProgram
from tests.core.sandbox.wat_guests import run, wat_guest

_AREA = 160  # where answers of calls go that nobody reads
_PROMPT = 200_000  # where the prompt's tokens lie
_MORE_LOCALS = "(local $at i32) (local $generation i32)"

_WARM = f"(call $warm (local.get $sampler) (f32.const {{temperature}}) (i32.const {_AREA}))"
_FILL = f"""(drop (memory.grow (i32.const 8)))
  (local.set $at (i32.const {{tokens}}))
  (loop $fill
    (local.set $at (i32.sub (local.get $at) (i32.const 1)))
    (i32.store (i32.add (i32.const {_PROMPT}) (i32.shl (local.get $at) (i32.const 2))) (local.get $at))
    (br_if $fill (local.get $at)))
  (call $append (local.get $context) (i32.const {_PROMPT}) (i32.const {{tokens}}) (i32.const {_AREA}))"""
_FLUSH = f"""(call $flush (local.get $context) (i32.const {_AREA}))
  (call $finish (i32.load (i32.const {_AREA + 4})) (i32.const {_AREA}))"""
_WAIT = f"(call $take (call $receive) (i32.const {_AREA}))"
_STEP = """(call $step (local.get $context) (local.get $token) (local.get $sampler) (i32.const 120))
      (local.set $token (i32.load (i32.const 124)))"""
_GENERATE = f"""(local.set $generation (call $generation (local.get $context) (local.get $sampler)))
  (call $most (local.get $generation) (i32.const {{tokens}}) (i32.const {_AREA}))
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


def offloaded(prompt: int, tokens: int, temperature: float = 0.0) -> bytes:
    """One generation by the engine, behind a flushed prompt; its tokens come at the end."""
    body = [
        HANDLES,
        _WARM.format(temperature=temperature),
        _FILL.format(tokens=prompt),
        _FLUSH,
        _WAIT,
        _GENERATE.format(tokens=tokens),
    ]
    return _guest(body, _GENERATE_CALLS, _GENERATE_IMPORTS)


def stepping(prompt: int, tokens: int, temperature: float = 0.0) -> bytes:
    """A call of the host for each token."""
    body = [
        HANDLES,
        _WARM.format(temperature=temperature),
        _FILL.format(tokens=prompt),
        _FLUSH,
        _WAIT,
        loop(tokens, _STEP),
    ]
    return _guest(body, ["forward/step"], _STEP_IMPORT)


def _guest(body: list[str], calls: list[str], imports: str) -> bytes:
    main = run("\n  ".join(body), locals_=f"{LOCALS} {_MORE_LOCALS}")
    return wat_guest(main, [*_CALLS, *calls], _IMPORTS + imports)


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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.wasm"
        path.write_bytes((offloaded if is_offloaded else stepping)(prompt, tokens, temperature))
        async with LentApplication(driver, depth) as app:
            crowd = Crowd(app, ComponentProgram("guest", path), [{}] * guests)
            await crowd.ready()
            app.watched.take_steps()
            crowd.go()
            await crowd.end()
            return decode_of(app, guests)
