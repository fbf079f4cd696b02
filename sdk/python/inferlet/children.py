"""Programs that this one launches: they run beside it, for the same user, and can be asked for their result."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from typing import Any

from wit_world.imports import children as bindings

from inferlet.errors import InvalidRequest
from inferlet.host import Scoped, call, drop, finish


class Child(Scoped):
    """A program that was launched. `await child` gives what it returns, or raises what ended it.

    It goes on when nobody holds it any more, and when this program ends. `with launch(…) as child:` ends it at the end
    of the block, should it still run.
    """

    __slots__ = ("_handle", "_pid")

    def __init__(self, handle: bindings.Child) -> None:
        self._handle: bindings.Child | None = handle
        self._pid = handle.pid()

    @property
    def pid(self) -> str:
        """The id of its process, under which clients of a server find it."""
        return self._pid

    async def result(self) -> Any:
        """What it returns, once it has. Raises the error that ended it; other tasks run meanwhile."""
        handle = self._alive()
        text = await finish(handle.pollable, handle.get)
        return None if text is None else json.loads(text)

    wait = result

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    def cancel(self) -> None:
        """Ends it; awaiting it raises Cancelled, unless it had ended already."""
        self._alive().cancel()

    def detach(self) -> None:
        """Lets it go on by itself."""
        if self._handle is not None:
            drop(self._handle)
            self._handle = None

    def _leave(self) -> None:
        if self._handle is not None:
            self.cancel()
            self.detach()

    def __repr__(self) -> str:
        return f"Child({self._pid})"

    def _alive(self) -> bindings.Child:
        if self._handle is None:
            raise InvalidRequest(f"child {self._pid} was detached: it goes on by itself")
        return self._handle


def launch(program: str, arguments: Mapping[str, Any] | str | None = None) -> Child:
    """Starts a program by name or name@version; its input is what JSON can hold, or JSON text."""
    text = arguments if isinstance(arguments, str) else json.dumps(dict(arguments or {}))
    return Child(call(bindings.launch, program, text))
