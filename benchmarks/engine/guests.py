"""The programs that are measured. Each waits for a message before it begins, so that a crowd of them starts together.

Python programs are source; the others are components in WebAssembly text, which cost the sandbox as little as any.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from benchmarks.host_calls import HANDLE_CALLS, HANDLE_IMPORTS, HANDLES, LOCALS, loop
from pie_core.programs import ComponentProgram, ProgramSource, PythonProgram
from tests.core.sandbox.wat_guests import run, wat_guest

_BEGIN = """
import asyncio
from inferlet import Context, Model, Sampler, session

async def main(input):
    ctx = Context(Model.load()).append([1, 2, 3])
    await session.receive()
"""

OFFLOADED = (
    _BEGIN
    + """
    await ctx.generate(Sampler.argmax(), max_tokens=input["tokens"], auto_flush=False, stop=[]).collect_tokens()
"""
)

PER_TOKEN = (
    _BEGIN
    + """
    await ctx.flush()
    ctx.append([4])
    generation = ctx.generate(Sampler.argmax(), max_tokens=input["tokens"], auto_flush=False, stop=[])
    async for step in generation:
        await step.execute()
"""
)

_WAIT_CALLS = ["session/receive", "session/[method]pending-message.take"]
_WAIT_IMPORTS = """(import "host" "receive" (func $receive (result i32)))
  (import "host" "[method]pending-message.take" (func $take (param i32 i32)))"""
_WAIT = "(call $take (call $receive) (i32.const 160))"
_STEP_IMPORT = '(import "host" "step" (func $step (param i32 i32 i32 i32)))'
_STEP = """(call $step (local.get $context) (local.get $token) (local.get $sampler) (i32.const 120))
      (local.set $token (i32.load (i32.const 124)))"""

_SPIN = """(local.set $spins (i32.const {turns}))
      (block $done (loop $spin
        (br_if $done (i32.eqz (local.get $spins)))
        (local.set $spins (i32.sub (local.get $spins) (i32.const 1)))
        (br $spin)))"""
_PASS_CALLS = [
    "forward/[constructor]forward-pass",
    "forward/[method]forward-pass.input",
    "forward/[method]forward-pass.sample",
    "forward/[method]forward-pass.execute",
    "forward/[method]pending-pass.tokens",
]
_PASS_IMPORTS = """(import "host" "[constructor]forward-pass" (func $pass (param i32) (result i32)))
  (import "host" "[method]forward-pass.input" (func $input (param i32 i32 i32 i32)))
  (import "host" "[method]forward-pass.sample" (func $sample (param i32 i32 i32 i32 i32)))
  (import "host" "[method]forward-pass.execute" (func $execute (param i32 i32)))
  (import "host" "[method]pending-pass.tokens" (func $tokens (param i32 i32)))"""
_EXECUTE = """(i32.store (i32.const 200) (i32.const 0))
      (local.set $pass (call $pass (local.get $context)))
      (call $input (local.get $pass) (i32.const 200) (i32.const 1) (i32.const 160))
      (call $sample (local.get $pass) (i32.const 200) (i32.const 1) (local.get $sampler) (i32.const 160))
      (call $execute (local.get $pass) (i32.const 160))
      (local.set $pending (i32.load (i32.const 164)))"""
_TAKE_TOKENS = "(call $tokens (local.get $pending) (i32.const 160))"
_CLOCK_CALLS = ["poll/now-ns", "poll/wait"]
_CLOCK_IMPORTS = """(import "host" "now-ns" (func $now (result i64)))
  (import "host" "wait" (func $wait (param i32 i32 i32 i64 i32)))"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of guest; for components, the tokens it draws are part of the component."""

    name: str
    is_component: bool = False
    steps_itself: bool = True  # it has code per token
    text: str = ""

    def program(self, folder: Path, tokens: int) -> ProgramSource:
        if self.is_component:
            return component(folder, f"step-{tokens}", stepping(tokens))
        return python(self.name, self.text)


KINDS = (
    Kind("Python, offloaded", steps_itself=False, text=OFFLOADED),
    Kind("Python, code per token", text=PER_TOKEN),
    Kind("WAT, code per token", is_component=True),
)


def python(name: str, source: str) -> ProgramSource:
    label = "".join(each if each.isalnum() else "-" for each in name)
    return PythonProgram(label, (("main.py", textwrap.dedent(source)),), "main.py")


def component(folder: Path, name: str, content: bytes) -> ProgramSource:
    path = folder / f"{name}.wasm"
    path.write_bytes(content)
    return ComponentProgram(name, path)


def stepping(tokens: int, *, spins: int = 0) -> bytes:
    """Draws so many tokens, computing for so many turns of a loop before each."""
    body = (_SPIN.format(turns=spins) if spins else "") + _STEP
    return wat_guest(
        run(HANDLES + _WAIT + loop(tokens, body), locals_=f"{LOCALS} (local $spins i32)"),
        [*HANDLE_CALLS, *_WAIT_CALLS, "forward/step"],
        HANDLE_IMPORTS + _WAIT_IMPORTS + _STEP_IMPORT,
    )


def timed_stepping(tokens: int, pause_ms: float) -> bytes:
    """Sleeps before each step, and reads the clock before and after it."""
    body = _pause(pause_ms) + "(drop (call $now))" + _STEP + "(drop (call $now))"
    return wat_guest(
        run(HANDLES + _WAIT + loop(tokens, body), locals_=LOCALS),
        [*HANDLE_CALLS, *_WAIT_CALLS, "forward/step", *_CLOCK_CALLS],
        HANDLE_IMPORTS + _WAIT_IMPORTS + _STEP_IMPORT + _CLOCK_IMPORTS,
    )


def timed_taking(tokens: int, pause_ms: float) -> bytes:
    """Executes a pass, sleeps, and takes what it drew: reads the clock before and after taking it."""
    body = _EXECUTE + _pause(pause_ms) + "(drop (call $now))" + _TAKE_TOKENS + "(drop (call $now))"
    return wat_guest(
        run(HANDLES + _WAIT + loop(tokens, body), locals_=f"{LOCALS} (local $pass i32) (local $pending i32)"),
        [*HANDLE_CALLS, *_WAIT_CALLS, *_PASS_CALLS, *_CLOCK_CALLS],
        HANDLE_IMPORTS + _WAIT_IMPORTS + _PASS_IMPORTS + _CLOCK_IMPORTS,
    )


def _pause(milliseconds: float) -> str:
    nanoseconds = round(1e6 * milliseconds)
    return f"(call $wait (i32.const 0) (i32.const 0) (i32.const 1) (i64.const {nanoseconds}) (i32.const 160))"


def spinning(spins: int) -> bytes:
    """Computes and ends: to find out how long a turn takes."""
    return wat_guest(
        run(_SPIN.format(turns=spins), locals_="(local $spins i32)"),
    )


def waiting() -> bytes:
    """Waits for a message, and ends."""
    return wat_guest(run(_WAIT), _WAIT_CALLS, _WAIT_IMPORTS)
