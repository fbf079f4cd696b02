"""Guests as fibers: the pinned private bindings of wasmtime that suspend, resume and cancel a running component.

Nothing outside this file and `converters.py` touches what wasmtime-py does not document. The C functions are called
through plain addresses, because wasmtime-py's own prototypes build a pointer object for every argument.

A suspending host function fills in a continuation: wasmtime asks `callback(env) -> bool` on every poll whether the
result is there. Ours is the C library's `strlen` over the fiber's two-byte flag ("\\0" is "not yet", "\\1\\0" is
"yes"), so that a suspension costs no Python call beyond the host function itself.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import wasmtime
from wasmtime import _bindings as bindings
from wasmtime.component import Component, Linker, LinkerInstance, ResourceType

from pie_core.errors import PieError

WASMTIME = "50.0.1"
PYTHON = tuple(sys.version_info[:3])
STACK_BLIND_PYTHON = (3, 14, 0)
VALUE_BYTES = 32  # sizeof(wasmtime_component_val_t)
MIB = 1 << 20

# What else one guest may have; the memory limit counts for each of its memories, of which a program needs one.
MEMORIES = 4
TABLES = 64
TABLE_ELEMENTS = 1 << 20
INSTANCES = 1000

Address = ctypes.c_void_p
SyncCallback = ctypes.CFUNCTYPE(
    Address, Address, Address, Address, Address, ctypes.c_size_t, Address, ctypes.c_size_t
)
AsyncCallback = ctypes.CFUNCTYPE(
    None, Address, Address, Address, Address, ctypes.c_size_t, Address, ctypes.c_size_t, Address, Address
)
Destructor = ctypes.CFUNCTYPE(Address, Address, Address, ctypes.c_uint32)


class FiberError(PieError):
    """The installed wasmtime is not the one whose private bindings this file knows, or they misbehave."""

    code = "sandbox"


class GuestStopped(Exception):
    """wasmtime ended a call; the text is its message and backtrace."""


def address_of(pointer: Any) -> int:
    """The address that a wasmtime-py or ctypes pointer holds. `ctypes.cast` would make it refer to itself."""
    address: int | None = Address.from_buffer(pointer).value
    assert address is not None
    return address


def c_function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of wasmtime's shared library as a plain foreign function over addresses."""
    return ctypes.CFUNCTYPE(result, *arguments)(address_of(getattr(_library, name)))


def native_address(name: str) -> int:
    """Of a function of wasmtime's shared library."""
    return address_of(getattr(_library, name))


def quick_function(name: str, result: Any) -> Any:
    """The same for the path of every token: it keeps the interpreter's lock and converts nothing.

    So it must be short, and takes ctypes values only: `byref(…)`, `c_void_p` and the like, never an int.
    """
    return ctypes.PYFUNCTYPE(result)(address_of(getattr(_library, name)))


def check_version() -> None:
    """Refuses what the bindings would break on: another wasmtime, or a CPython that knows no stack but its own."""
    installed = version("wasmtime")
    if installed != WASMTIME:
        raise FiberError(
            f"the sandbox needs wasmtime {WASMTIME}, this environment has {installed}: "
            f"pip install wasmtime=={WASMTIME}"
        )
    if PYTHON == STACK_BLIND_PYTHON:  # python/cpython#139653
        raise FiberError(
            "CPython 3.14.0 takes every fiber for a stack overflow and ends the process: use 3.14.1 or later"
        )


check_version()

_library: Any = bindings.dll  # type: ignore[attr-defined]  # private on purpose: see the top
_SIZE = ctypes.c_size_t
_add_func = c_function(
    "wasmtime_component_linker_instance_add_func",
    Address,
    Address,
    ctypes.c_char_p,
    _SIZE,
    Address,
    Address,
    Address,
)
_add_func_async = c_function(
    "wasmtime_component_linker_instance_add_func_async",
    Address, Address, ctypes.c_char_p, _SIZE, Address, Address, Address,
)  # fmt: skip
_add_resource = c_function(
    "wasmtime_component_linker_instance_add_resource",
    Address, Address, ctypes.c_char_p, _SIZE, Address, Address, Address, Address,
)  # fmt: skip
_instantiate_async = c_function(
    "wasmtime_component_linker_instantiate_async", Address, Address, Address, Address, Address, Address
)
_call_async = c_function(
    "wasmtime_component_func_call_async",
    Address, Address, Address, Address, _SIZE, Address, _SIZE, Address,
)  # fmt: skip
_get_export_index = c_function(
    "wasmtime_component_instance_get_export_index", Address, Address, Address, Address, ctypes.c_char_p, _SIZE
)
_export_index_delete = c_function("wasmtime_component_export_index_delete", None, Address)
_get_func = c_function(
    "wasmtime_component_instance_get_func", ctypes.c_bool, Address, Address, Address, Address
)
poll_future = c_function("wasmtime_call_future_poll", ctypes.c_bool)  # takes Fiber.future; see Fiber.poll
_delete = c_function("wasmtime_call_future_delete", None, Address)
_set_deadline = c_function("wasmtime_context_set_epoch_deadline", None, Address, ctypes.c_uint64)
# The header promises an error; the function returns nothing, and the register holds garbage.
_yield_at_deadline = c_function(
    "wasmtime_context_epoch_deadline_async_yield_and_update", None, Address, ctypes.c_uint64
)
_increment_epoch = c_function("wasmtime_engine_increment_epoch", None, Address)
_error_new = c_function("wasmtime_error_new", Address, ctypes.c_char_p)
_value_delete = c_function("wasmtime_component_val_delete", None, Address)
_func_type_async = c_function("wasmtime_component_func_type_async", ctypes.c_bool, Address)

_strlen_address = address_of(ctypes.CDLL(None).strlen)
_continuation = struct.Struct("<QQQ")  # callback, env, finalizer
_NO_VALUE = bytes(VALUE_BYTES)  # kind 0, a bool: what an unwritten result must look like


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What is compiled into code: programs are cached by it.

    Host functions run on the fiber's stack as well, where CPython up to 3.13 assumes what a main thread usually has:
    with less, a deep recursion of ours would end the process instead of raising RecursionError.
    """

    wasm_stack_bytes: int = MIB
    fiber_stack_bytes: int = 16 * MIB

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def new_engine(options: EngineOptions) -> wasmtime.Engine:
    """An engine whose guests can be suspended and interrupted."""
    config = wasmtime.Config()
    config.epoch_interruption = True
    pointer = config.ptr()
    # 50.0.1 traps when a host function receives two borrows while concurrency support is on.
    bindings.wasmtime_config_concurrency_support_set(pointer, False)
    # A guest could wait on shared memory or grow a garbage-collected heap past its limits; none of ours needs either.
    bindings.wasmtime_config_wasm_threads_set(pointer, False)
    bindings.wasmtime_config_wasm_gc_set(pointer, False)
    bindings.wasmtime_config_max_wasm_stack_set(pointer, options.wasm_stack_bytes)
    bindings.wasmtime_config_async_stack_size_set(pointer, options.fiber_stack_bytes)
    return wasmtime.Engine(config)


def epoch_incrementer(engine: wasmtime.Engine) -> Callable[[], None]:
    """Advances the engine's epoch; the only function here that another thread may call."""
    address = address_of(engine.ptr())

    def increment(_kept: wasmtime.Engine = engine) -> None:
        _increment_epoch(address)

    return increment


def new_error(text: str) -> int:
    """A wasmtime error to return from a host function: the guest traps."""
    return int(_error_new(text.encode()))


def is_async(function_type: Any) -> bool:
    """Whether a component's function type is a component-model `async func`, which this host cannot call."""
    return bool(_func_type_async(address_of(function_type.ptr())))


class LinkerNames:
    """Defines host functions and resources in one named instance of a linker; use it in a `with`."""

    def __init__(self, root: LinkerInstance, name: str) -> None:
        self._instance = root.add_instance(name)
        self._address = address_of(self._instance.ptr())

    def __enter__(self) -> LinkerNames:
        return self

    def __exit__(self, *exc: object) -> None:
        self._instance.close()

    def function(self, name: str, callback: Any) -> None:
        """`callback` is a SyncCallback or an AsyncCallback, which the caller keeps alive."""
        add = _add_func_async if isinstance(callback, AsyncCallback) else _add_func
        encoded = name.encode()
        _raise_for(
            add(self._address, encoded, len(encoded), ctypes.cast(callback, Address).value, None, None)
        )

    def native_function(self, name: str, callback: int, data: int) -> None:
        """A suspending function that is not Python's: what it is called with first is `data`."""
        encoded = name.encode()
        _raise_for(_add_func_async(self._address, encoded, len(encoded), callback, data, None))

    def resource(self, name: str, type_id: int, destructor: Any) -> None:
        encoded = name.encode()
        kind = ResourceType.host(type_id)
        pointer = ctypes.cast(destructor, Address).value
        error = _add_resource(
            self._address, encoded, len(encoded), address_of(kind.ptr()), pointer, None, None
        )
        _raise_for(error)


class Fiber:
    """One store with at most one call in progress: begin, poll until done, take the result.

    Never polled, cancelled or closed from inside its own poll.
    """

    __slots__ = (
        "_arguments",
        "_error",
        "_future",
        "_instance",
        "_keep",
        "_linker",
        "_results",
        "_store",
        "answer_call",
        "context",
        "context_argument",
        "continuation",
        "flag",
        "future",
        "poll_call",
        "record",
        "result",
        "ticks",
    )

    def __init__(
        self,
        engine: wasmtime.Engine,
        linker: Linker,
        memory_bytes: int,
        ticks: int,
        record: Any = None,
        poll_call: Any = poll_future,
        answer_call: Any = None,
    ) -> None:
        """The last three are quick_calls', where it is used: its record begins with flag, context, future."""
        self._store: wasmtime.Store | None = wasmtime.Store(engine)
        self._store.set_limits(memory_bytes, TABLE_ELEMENTS, INSTANCES, TABLES, MEMORIES)
        self._linker = linker
        self.context = address_of(self._store._context())
        self.ticks = ticks
        _set_deadline(self.context, ticks)
        _yield_at_deadline(self.context, ticks)
        self.context_argument = Address.from_param(self.context)
        self.record, self.poll_call, self.answer_call = record, poll_call, answer_call
        if record is not None:
            record[1] = self.context
        self.flag = ctypes.c_uint16(0) if record is None else ctypes.c_uint16.from_buffer(record)
        # The flag is 0: the continuation answers "not yet", 1: "yes"
        self.continuation = _continuation.pack(_strlen_address, ctypes.addressof(self.flag), 0)
        self._instance = bindings.wasmtime_component_instance_t()
        self._error = ctypes.c_void_p()
        self._future = 0
        self.future: Any = None  # of the call in progress, as `poll_call` takes it
        self._arguments: Any = None
        self._results: Any = (ctypes.c_char * VALUE_BYTES)()
        self.result = ctypes.addressof(self._results)
        self._keep: Any = None

    @property
    def in_call(self) -> bool:
        return self._future != 0

    def begin_instantiate(self, component: Component) -> None:
        assert not self._future
        assert self._store is not None
        self._keep = component
        self._error.value = None
        self._future = _instantiate_async(
            address_of(self._linker.ptr()),
            self.context,
            address_of(component.ptr()),
            ctypes.addressof(self._instance),
            ctypes.addressof(self._error),
        )
        self._note_future()

    def begin_call(self, name: str, count: int, write: Callable[[int], None], gives: bool) -> None:
        """Calls an export with `count` arguments, which `write(address)` lays down."""
        assert not self._future
        assert self._store is not None
        function = self._export(name)
        self._arguments = (ctypes.c_char * (VALUE_BYTES * count))()
        write(ctypes.addressof(self._arguments))
        ctypes.memmove(self.result, _NO_VALUE, VALUE_BYTES)
        self._keep = function
        self._error.value = None
        self._future = _call_async(
            ctypes.addressof(function),
            self.context,
            ctypes.addressof(self._arguments),
            count,
            self.result,
            1 if gives else 0,
            ctypes.addressof(self._error),
        )
        self._note_future()

    def _note_future(self) -> None:
        if self.record is None:
            self.future = Address.from_param(self._future)
        else:
            self.record[2] = self._future
            self.future = ctypes.byref(self.record)

    def poll(self) -> bool:
        """Runs the guest until it suspends, yields or ends; true when the call has ended."""
        return bool(self.poll_call(self.future))

    def hold(self) -> None:
        """The continuation answers "not yet" from now on."""
        self.flag.value = 0

    def release(self) -> None:
        """The result is written: the continuation answers "yes"."""
        self.flag.value = 1

    def refresh_deadline(self) -> None:
        """Starts a new time slice; without it a guest that was suspended for long would yield at once."""
        _set_deadline(self.context, self.ticks)

    def end_call(self) -> None:
        """Frees a finished call; raises GuestStopped if it failed. An unfinished one is unwound and forgotten."""
        future, self._future, self.future = self._future, 0, None
        if future:
            _delete(future)
        self._free_arguments()
        self._keep = None
        error, self._error.value = self._error.value, None  # taken once
        _raise_for(error)

    def clear_result(self) -> None:
        """Frees what the last call returned."""
        _value_delete(self.result)
        ctypes.memmove(self.result, _NO_VALUE, VALUE_BYTES)

    def close(self) -> None:
        """Unwinds a call in progress and frees the store. Safe to call twice."""
        if self._store is None:
            return
        with suppress(GuestStopped):  # the caller has a reason of its own for closing
            self.end_call()
        self._store.close()
        self._store = None

    def _export(self, name: str) -> Any:
        encoded = name.encode()
        instance = ctypes.addressof(self._instance)
        index = _get_export_index(instance, self.context, None, encoded, len(encoded))
        function = bindings.wasmtime_component_func_t()
        found = index and _get_func(instance, self.context, index, ctypes.addressof(function))
        if index:
            _export_index_delete(index)
        if not found:
            raise GuestStopped(f"the program exports no function {name!r}")
        return function

    def _free_arguments(self) -> None:
        if self._arguments is not None:
            base = ctypes.addressof(self._arguments)
            for offset in range(0, len(self._arguments), VALUE_BYTES):
                _value_delete(base + offset)
            self._arguments = None


def _raise_for(error: int | None) -> None:
    if error:
        raise GuestStopped(reason_of(error))


def reason_of(error: int) -> str:
    """In wasmtime's words; frees the error."""
    pointer = ctypes.cast(error, ctypes.POINTER(bindings.wasmtime_error_t))
    return str(wasmtime.WasmtimeError._from_ptr(pointer))
