"""`pie`, with a scripted program in place of the engine and the sandbox: `python scripted_run.py run ...`.

What the program does is named by its input `act`; everything around it is the real command.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Awaitable, Callable
from typing import Any

from pie_core.cli import main
from pie_core.cli.terminal import Terminal
from pie_core.config import Config
from pie_core.contracts.driver import Progress
from pie_core.errors import GuestError

Act = Callable[[dict[str, Any], Terminal], Awaitable[Any]]


async def stream(inputs: dict[str, Any], terminal: Terminal) -> Any:
    terminal.progress(Progress("loading", 1, 2))
    for piece in ("Par", "is ", "é"):
        terminal.on_message(piece)
        await asyncio.sleep(0)
    terminal.on_stdout(b"\nprinted\xff")
    terminal.on_stderr(b"complaint\n")
    return inputs.get("value")


async def echo(inputs: dict[str, Any], terminal: Terminal) -> Any:
    lines = []
    while (line := await terminal.next_line()) is not None:
        lines.append(line)
    return lines


async def fail(inputs: dict[str, Any], terminal: Terminal) -> Any:
    terminal.on_stdout(b"half a line")
    raise GuestError('Traceback (most recent call last):\n  File "main.py", line 3, in main\nValueError: no')


async def wait(inputs: dict[str, Any], terminal: Terminal) -> Any:
    terminal.on_stdout(b"waiting\n")
    try:
        await asyncio.sleep(600)
    finally:
        await asyncio.sleep(inputs.get("cleanup", 0))
        terminal.on_stderr(b"cleaned up\n")


async def send_file(inputs: dict[str, Any], terminal: Terminal) -> Any:
    terminal.on_file(b"one")
    terminal.on_file(b"two")


async def flood(inputs: dict[str, Any], terminal: Terminal) -> Any:
    for _ in range(2000):
        terminal.on_stdout(b"x" * 1000 + b"\n")


async def inputs_back(inputs: dict[str, Any], terminal: Terminal) -> Any:
    return inputs


ACTS: dict[str, Act] = {
    act.__name__: act for act in (stream, echo, fail, wait, send_file, flood, inputs_back)
}


async def run_program(config: Config, program: str, inputs: dict[str, Any], terminal: Terminal) -> Any:
    return await ACTS[inputs.pop("act")](inputs, terminal)


if __name__ == "__main__":
    app = types.ModuleType("pie_core.app")
    app.run_program = run_program  # type: ignore[attr-defined]  # the seam between the command and the engine
    sys.modules["pie_core.app"] = app
    main()
