"""A compiled program: a component that fits one of our worlds, linked to this host and ready to start guests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasmtime.component import Component, Linker

from pie_core.errors import ProgramError
from pie_core.sandbox.compilation import Progress
from pie_core.sandbox.converters import Converters, Reader
from pie_core.sandbox.fibers import VALUE_BYTES
from pie_core.sandbox.guest import Guest
from pie_core.sandbox.hosting import GuestState
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.linker import OURS
from pie_core.sandbox.reflection import ComponentShape, shape_of
from pie_core.sandbox.runtime import Runtime
from pie_core.sandbox.signatures import our_interfaces
from pie_core.sandbox.wasi.streams import ByteSource
from pie_core.sandbox.wit_types import Function, Type, same_function

INFERLET = "inferlet"
SCRIPT_RUNTIME = "script-runtime"


@dataclass(frozen=True, slots=True)
class Export:
    """One callable export, with its converters; `read` is None where it returns nothing."""

    kinds: tuple[Type, ...]
    write: Callable[[int, Sequence[Any], Any], None]
    read: Reader | None


class Program:
    """Made by `load`; `world` is "inferlet" or "script-runtime"."""

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        component: Component,
        linker: Linker,
        exports: dict[str, Function],
        world: str,
    ) -> None:
        self.name = name
        self.world = world
        self.component = component
        self.linker = linker
        self._runtime = runtime
        self._exports = {
            label: _export(label, function, runtime.converters) for label, function in exports.items()
        }

    @classmethod
    async def load(
        cls,
        runtime: Runtime,
        source: bytes | str | Path,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> Program:
        """Compiles (or finds) a component given as bytes or as a file, and checks that it fits this host.

        Raises ProgramError: not WebAssembly, a core module, another world, an import that this host does not offer;
        ProgramTooLarge: a limit of compilation.
        """
        if not isinstance(source, bytes):
            name = name or Path(source).name
            source = await asyncio.to_thread(_read, Path(source))
        name = name or "the program"
        component = await runtime.compiler.load(source, name, progress)
        shape = shape_of(runtime.engine, component)
        world = _world(shape, name)
        linker = runtime.linker.link(runtime.engine, shape, name)
        wanted = our_interfaces()[f"{OURS}/{world}"].functions
        return cls(runtime, name, component, linker, wanted, world)

    def start(
        self, state: GuestState, limits: Limits | None = None, stdin: ByteSource | None = None
    ) -> Guest:
        """A fresh guest: its own memory, handles and limits. It runs when it is called."""
        return Guest(self._runtime, self, state, limits or Limits(), stdin)

    def export(self, name: str) -> Export:
        try:
            return self._exports[name]
        except KeyError:
            raise ProgramError(
                f"{self.name} has no export {name!r}; the world {self.world} has {', '.join(self._exports)}"
            ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProgramError(f"the program {path} cannot be read: {error.strerror}") from error


def _world(shape: ComponentShape, name: str) -> str:
    """The world that the exports fit."""
    world = SCRIPT_RUNTIME if "load" in shape.exports or "load" in shape.asynchronous else INFERLET
    for label, ours in our_interfaces()[f"{OURS}/{world}"].functions.items():
        _check_export(shape, name, world, label, ours)
    return world


def _check_export(shape: ComponentShape, name: str, world: str, label: str, ours: Function) -> None:
    if label in shape.asynchronous:
        raise ProgramError(
            f"{name} exports {label!r} as an async func; the world {world} has the plain {ours}"
        )
    theirs = shape.exports.get(label)
    if theirs is None:
        has = ", ".join(sorted([*shape.exports, *shape.asynchronous])) or "no function"
        raise ProgramError(
            f"{name} is of another world: it does not export {label!r}: {ours}; it exports {has}"
        )
    if not same_function(theirs, ours):
        raise ProgramError(f"{name} exports {label!r} as {theirs}; the world {world} has {ours}")


def _export(name: str, function: Function, converters: Converters) -> Export:
    kinds = tuple(kind for _, kind in function.params)
    writers = [converters.writer(kind) for kind in kinds]

    def write(address: int, values: Sequence[Any], owner: Any) -> None:
        if len(values) != len(writers):
            raise TypeError(f"{name} takes {len(writers)} arguments, {len(values)} were given: {function}")
        for index, (writer, value) in enumerate(zip(writers, values, strict=True)):
            writer(address + index * VALUE_BYTES, value, owner)

    return Export(kinds, write, None if function.result is None else converters.reader(function.result))
