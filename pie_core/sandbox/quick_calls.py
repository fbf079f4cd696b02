"""An optional piece in C: suspending calls of handles and numbers are noted down on a guest's stack, and served off it.

    python -m pie_core.sandbox.quick_calls       compiles it (needs a C compiler, `cc`) and prints its path

`pie serve` compiles it where it can. Without it everything works the same; the host functions themselves are Python's
either way. What it saves is Python on the stack of each guest: the callback's frames, and the memory of many stacks
that they have to be brought to. A guest that calls such a function gives way; the pump then serves it and goes on as
with any other.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pie_core.errors import ProgramError
from pie_core.paths import cache_dir, make_private_dir
from pie_core.sandbox.fibers import WASMTIME, native_address
from pie_core.sandbox.wit_types import Function, Handle, Primitive, Record, ResultOf, Type

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("quick_calls.c")
MOST = 6  # arguments
FLAG, CONTEXT, FUTURE, CALLED, RESULTS, ARGUMENTS = range(6)  # words of a record
RECORD = ctypes.c_uint64 * (ARGUMENTS + MOST + 1)

_SHAPE = ctypes.c_uint64 * (3 + MOST)
_MASKS = {"u8": 0xFF, "u16": 0xFFFF, "u32": 0xFFFF_FFFF, "u64": 0xFFFF_FFFF_FFFF_FFFF}
_HANDLE = 0
_USED = (
    "wasmtime_component_resource_any_to_host",
    "wasmtime_component_resource_host_rep",
    "wasmtime_component_resource_host_delete",
    "wasmtime_error_delete",
    "wasmtime_call_future_poll",
    "wasmtime_component_val_new",
)

Serve = Callable[[Any, Any], bool]  # (guest, its record) -> whether the result is written already


@dataclass(frozen=True, slots=True)
class QuickFunction:
    """A host function as it is linked: what wasmtime calls, and with which data."""

    callback: int
    shape: Any  # kept as long as anything that was linked with it

    @property
    def data(self) -> int:
        return ctypes.addressof(self.shape)


class QuickCalls:
    """The loaded library, and the functions of one runtime that are noted down by it."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        loaded.pie_use(*(ctypes.c_void_p(native_address(name)) for name in _USED))
        self._keep = loaded
        self._callback = _address(loaded.pie_note)
        self.poll: Any = ctypes.CFUNCTYPE(ctypes.c_bool)(_address(loaded.pie_poll))  # takes byref(record)
        # Likewise; writes the number in the record's first argument as what the call gives, first.
        self.answer: Any = ctypes.CFUNCTYPE(ctypes.c_bool)(_address(loaded.pie_answer))
        self.served: list[Serve] = [_nothing_was_called]

    def function(self, masks: Sequence[int], serve: Serve, ok_kind: int = 0) -> QuickFunction:
        """`masks` as `masks_of` gives them; `ok_kind` is wasmtime's of the number that it gives, if it gives one."""
        number = len(self.served)
        self.served.append(serve)
        return QuickFunction(self._callback, _SHAPE(number, len(masks), ok_kind, *masks))


def masks_of(function: Function) -> list[int] | None:
    """What its arguments are made of: bits of a number, 0 for a handle. None if it cannot be noted down.

    Whatever goes wrong must have a side of the result to go to, because the guest cannot trap any more.
    """
    if not isinstance(function.result, ResultOf) or not _is_our_error(function.result.err):
        return None
    masks = [_mask(kind) for _, kind in function.params]
    return None if len(masks) > MOST or None in masks else [mask for mask in masks if mask is not None]


def largest_ok(function: Function) -> int:
    """Of the number that it gives; 0 if it gives something else."""
    match function.result:
        case ResultOf(Primitive(name), _):
            return _MASKS.get(name, 0)
    return 0


def _mask(kind: Type) -> int | None:
    match kind:
        case Primitive(name):
            return _MASKS.get(name)
        case Handle(_, False):
            return _HANDLE
    return None


def _is_our_error(side: Type | None) -> bool:
    return isinstance(side, Record) and [name for name, _ in side.fields] == ["code", "message"]


def _nothing_was_called(guest: Any, record: Any) -> bool:
    raise AssertionError("a call was served that no guest has made")


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


# --- the library ---------------------------------------------------------------------------------------------------


def library_path() -> Path:
    """Where it lies once it was built: by its source, wasmtime and machine, so that a stale one is never loaded."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{WASMTIME} {sys.platform}".encode()).hexdigest()[:16]
    return cache_dir() / "native" / f"quick-calls-{key}.so"


@cache
def built_library() -> Path | None:
    path = library_path()
    return path if path.exists() else None


def build_if_possible(compiler: str = "cc") -> Path | None:
    """Builds it if it is not there yet. None, and a line in the log, where it cannot be built."""
    if built_library() is None:
        try:
            build(compiler)
        except (ProgramError, OSError) as error:
            _log.info("calls of programs are served without their piece in C: %s", error)
        built_library.cache_clear()
    return built_library()


def build(compiler: str = "cc") -> Path:
    """Raises ProgramError when there is no compiler, or it fails."""
    path = library_path()
    found = shutil.which(compiler)
    if found is None:
        raise ProgramError(f"no C compiler {compiler!r} was found; pie works without, only calls are slower")
    partial = make_private_dir(path.parent) / f"{path.name}.{os.getpid()}.partial"
    flags = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    made = subprocess.run([found, *flags, "-o", partial, SOURCE], capture_output=True, text=True, check=False)
    if made.returncode:
        raise ProgramError(f"{found} cannot compile {SOURCE}: {made.stderr.strip()}")
    partial.rename(path)
    return path


def main() -> int:
    try:
        print(build())
    except ProgramError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
