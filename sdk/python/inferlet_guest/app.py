"""The component's exports. What this module does at import happens once, when the component is built.

The heap is then part of the component: imports, warmed-up code and settings cost nothing at start. The garbage
collector is told to leave all of it alone, so that a guest's memory stays shared with the image until written to.
"""

from __future__ import annotations

import asyncio
import gc
import io
import random
import sys
import warnings
from typing import TextIO

import inferlet.legacy  # noqa: F401 - the package itself imports it on demand, which a guest cannot
import wit_world
from componentize_py_types import Err
from inferlet.event_loop import PollLoop
from wit_world.imports.types import Error

from inferlet_guest import standard_library
from inferlet_guest.program import Program, ProgramFailed


class WitWorld(wit_world.WitWorld):
    """`load` takes the source files, `run` calls their `main`. Each call comes on a new object."""

    def load(self, files: list[tuple[str, str]], entry: str) -> None:
        random.seed()  # the generator's state is part of the component
        try:
            _loaded.append(Program(files, entry))
            _loaded[-1].load()
        except ProgramFailed as failure:
            raise Err(Error(failure.code, failure.text)) from None

    def run(self, input: str) -> str | None:  # noqa: A002 - the WIT's name
        if not _loaded:
            raise Err(Error("invalid-request", "no program was loaded: call `load` first"))
        try:
            return _loaded[-1].run(input)
        except ProgramFailed as failure:
            raise Err(Error(failure.code, failure.text)) from None


_loaded: list[Program] = []


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    class _PollLoopPolicy(asyncio.DefaultEventLoopPolicy):
        """Makes `asyncio.run` use the program's own loop."""

        _loop_factory = PollLoop


WARM_UP = """
import asyncio, dataclasses, json

@dataclasses.dataclass
class Point:
    x: int = 0

async def main(input):
    await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
    try:
        raise ValueError("an example")
    except ValueError:
        return json.dumps([Point().x, input])
"""


def prepare() -> None:
    """Everything that the component brings along."""
    standard_library.import_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # policies are, but asyncio.run still asks them
        asyncio.set_event_loop_policy(_PollLoopPolicy())
    sys.stdout = _whole_lines(sys.stdout)
    sys.stderr = _whole_lines(sys.stderr)
    warm_up()
    gc.collect()
    gc.freeze()


def _whole_lines(stream: TextIO) -> TextIO:
    """The stream line by line. The raw one below drops what the host does not take at once; a buffer tries again."""
    raw = stream.buffer
    buffered = raw if isinstance(raw, io.BufferedWriter) else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def warm_up() -> None:
    """Runs a small program once, so that what every program needs is loaded and specialized."""
    for _ in range(3):
        program = Program([("warm_up.py", WARM_UP)], "warm_up.py")
        program.load()
        program.run('{"prompt": "hello"}')
        sys.meta_path.pop(0)
        del sys.modules["warm_up"]


prepare()
