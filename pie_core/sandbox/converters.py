"""WIT values <-> Python over wasmtime's raw C values, compiled once per signature.

A C value is 32 bytes: its kind at 0, its content from 8. Numbers lie there as they are; strings and lists as size and
pointer; option, variant and result as a pointer to a boxed value; handles as a pointer to a resource.
Readers and writers take a value's address. What wasmtime will free is allocated by wasmtime.
A value's kind is written last, so that a failure half-way leaves memory that wasmtime can still free.

Python sees: int, float, bool, str, bytes for list<u8>, list (or a numpy array) for other lists, None or the value for
option, tuple, a NamedTuple for record, str for enum, frozenset for flags, `Case` for variant, the host object for a
handle; for result<T, E> the T or `Refused(E)`.
"""

from __future__ import annotations

import ctypes
import struct
from collections import namedtuple
from collections.abc import Callable, Sequence
from ctypes import c_size_t, c_uint32, c_void_p
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from pie_core.sandbox.fibers import VALUE_BYTES, GuestStopped, c_function, quick_function, reason_of
from pie_core.sandbox.handles import Handles
from pie_core.sandbox.memory import MEMORY, WORDS
from pie_core.sandbox.wit_types import (
    Enum,
    Flags,
    Function,
    Handle,
    ListOf,
    OptionOf,
    Primitive,
    Record,
    ResultOf,
    TupleOf,
    Type,
    Variant,
)


class Case(NamedTuple):
    """One case of a variant."""

    name: str
    payload: Any = None


class Refused(Exception):
    """The error side of a result, as the value of its WIT type; host functions raise it."""

    def __init__(self, payload: Any = None) -> None:
        super().__init__(payload)
        self.payload = payload


class Owner(Protocol):
    """Whose handles cross: the guest."""

    @property
    def handles(self) -> Handles: ...

    @property
    def context(self) -> int: ...

    @property
    def context_argument(self) -> Any:
        """`context` as `quick_function`s take it."""


Reader = Callable[[int, Any], Any]  # (address of a C value, owner) -> value
Writer = Callable[[int, Any, Any], None]  # (address of a C value, value, owner)

_SIZE = VALUE_BYTES
_LIST, _RECORD, _TUPLE, _VARIANT, _ENUM, _OPTION, _RESULT, _FLAGS, _RESOURCE = (
    13,
    14,
    15,
    16,
    17,
    18,
    19,
    20,
    21,
)
_STRING = 12
_ENTRY_BYTES = 48  # a record's entry: its name (16), its value
_FEW = 16  # up to here a struct beats numpy

# name -> (kind, struct code, numpy type)
_SCALARS: dict[str, tuple[int, str, str]] = {
    "bool": (0, "?", "?"),
    "s8": (1, "b", "i1"),
    "u8": (2, "B", "u1"),
    "s16": (3, "h", "<i2"),
    "u16": (4, "H", "<u2"),
    "s32": (5, "i", "<i4"),
    "u32": (6, "I", "<u4"),
    "s64": (7, "q", "<i8"),
    "u64": (8, "Q", "<u8"),
    "f32": (9, "f", "<f4"),
    "f64": (10, "d", "<f8"),
}
_CHAR = 11
_MASKS = {"u8": 0xFF, "u16": 0xFFFF, "u32": 0xFFFF_FFFF, "u64": 0xFFFF_FFFF_FFFF_FFFF}

_bytes_new = c_function("wasm_byte_vec_new", None, c_void_p, c_size_t, ctypes.c_char_p)
_list_new = c_function("wasmtime_component_vallist_new_uninit", None, c_void_p, c_size_t)
_record_new = c_function("wasmtime_component_valrecord_new_uninit", None, c_void_p, c_size_t)
_tuple_new = c_function("wasmtime_component_valtuple_new_uninit", None, c_void_p, c_size_t)
_flags_new = c_function("wasmtime_component_valflags_new_uninit", None, c_void_p, c_size_t)
_box = quick_function("wasmtime_component_val_new", c_void_p)
_to_host = quick_function("wasmtime_component_resource_any_to_host", c_void_p)
_from_host = quick_function("wasmtime_component_resource_host_to_any", c_void_p)
_host_new = c_function("wasmtime_component_resource_host_new", c_void_p, ctypes.c_bool, c_uint32, c_uint32)
_host_number = quick_function("wasmtime_component_resource_host_rep", c_uint32)
_host_delete = quick_function("wasmtime_component_resource_host_delete", None)

_pair = struct.Struct("<QQ").unpack_from  # size, pointer
_put_head = struct.Struct("<B7xQ").pack_into  # kind, pointer
_put_result = struct.Struct("<B7xB7xQ").pack_into  # kind, is ok, pointer


def python_name(name: str) -> str:
    """`top-p` -> `top_p`."""
    return name.replace("-", "_")


@cache
def record_class(record: Record) -> type[tuple[Any, ...]]:
    """The NamedTuple in which a record's values arrive."""
    fields = [python_name(name) for name, _ in record.fields]
    return namedtuple(python_name(record.name or "record"), fields, rename=True)


class Converters:
    """Compiles readers and writers; `type_ids` numbers the resources. Belongs to one thread (writers have scratch)."""

    def __init__(self, type_id: Callable[[str], int]) -> None:
        self._type_id = type_id

    def arguments(self, kinds: Sequence[Type], arrays: bool = False) -> Callable[[int, Any], Sequence[Any]]:
        """(address of the C arguments, owner) -> Python arguments. Few arguments are read without a loop."""
        scalars = _scalar_struct(kinds)
        if scalars is not None:
            unpack = scalars.unpack_from
            return lambda address, owner: unpack(MEMORY, address)
        readers = [self.reader(kind, arrays) for kind in kinds]
        match readers:
            case [only]:
                return lambda address, owner: (only(address, owner),)
            case [first, second]:
                return lambda address, owner: (first(address, owner), second(address + _SIZE, owner))
            case [first, second, third]:
                return lambda address, owner: (
                    first(address, owner),
                    second(address + _SIZE, owner),
                    third(address + 2 * _SIZE, owner),
                )
        plan = [(reader, _SIZE * index) for index, reader in enumerate(readers)]
        return lambda address, owner: [reader(address + offset, owner) for reader, offset in plan]

    def reader(self, kind: Type, arrays: bool = False) -> Reader:
        match kind:
            case Primitive(name):
                return _primitive_reader(name)
            case ListOf(Primitive(name)) if name in _SCALARS:
                return _number_list_reader(name, arrays)
            case ListOf(element):
                return _list_reader(self.reader(element, arrays))
            case TupleOf(items):
                return _tuple_reader([self.reader(item, arrays) for item in items])
            case Record(_, fields):
                return _record_reader(record_class(kind), [self.reader(inner, arrays) for _, inner in fields])
            case OptionOf(payload):
                return _option_reader(self.reader(payload, arrays))
            case ResultOf(ok, err):
                return _result_reader(self._maybe_reader(ok, arrays), self._maybe_reader(err, arrays))
            case Variant(_, cases):
                return _variant_reader({name: self._maybe_reader(inner, arrays) for name, inner in cases})
            case Enum():
                return _text_at
            case Flags():
                return _read_flags
            case Handle(_, owned):
                return _handle_reader(owned)

    def _maybe_reader(self, kind: Type | None, arrays: bool) -> Reader | None:
        return None if kind is None else self.reader(kind, arrays)

    def writer(self, kind: Type) -> Writer:
        match kind:
            case Primitive(name):
                return _primitive_writer(name)
            case ListOf(Primitive(name)) if name in _SCALARS:
                return _number_list_writer(name)
            case ListOf(element):
                return _list_writer(self.writer(element))
            case TupleOf(items):
                return _tuple_writer([self.writer(item) for item in items])
            case Record():
                return self._record_writer(kind)
            case OptionOf(payload):
                return _option_writer(self.writer(payload))
            case ResultOf(ok, err):
                return _result_writer(self._maybe_writer(ok), self._maybe_writer(err))
            case Variant(_, cases):
                return _variant_writer({name: self._maybe_writer(inner) for name, inner in cases})
            case Enum(_, cases):
                return _enum_writer(frozenset(cases))
            case Flags():
                return _write_flags
            case Handle(resource, _):
                return _handle_writer(self._type_id(resource))

    def _maybe_writer(self, kind: Type | None) -> Writer | None:
        return None if kind is None else self.writer(kind)

    def _record_writer(self, record: Record) -> Writer:
        return _record_writer([(name, python_name(name), self.writer(kind)) for name, kind in record.fields])


def _scalar_struct(kinds: Sequence[Type]) -> struct.Struct | None:
    """One struct for all arguments if every one is a number."""
    codes = [
        _SCALARS[kind.name][1] for kind in kinds if isinstance(kind, Primitive) and kind.name in _SCALARS
    ]
    if len(codes) != len(kinds):
        return None
    sizes = (struct.calcsize("<" + code) for code in codes)
    return struct.Struct(
        "<" + "".join(f"8x{code}{24 - size}x" for code, size in zip(codes, sizes, strict=True))
    )


# --- reading -----------------------------------------------------------------------------------------------------


def _primitive_reader(name: str) -> Reader:
    if name == "string":
        return _text_at
    if name == "char":
        return lambda address, owner: chr(WORDS[(address >> 3) + 1] & 0xFFFFFFFF)
    if name in _MASKS:
        mask = _MASKS[name]
        return lambda address, owner: WORDS[(address >> 3) + 1] & mask
    unpack = struct.Struct("<" + _SCALARS[name][1]).unpack_from
    return lambda address, owner: unpack(MEMORY, address + 8)[0]


def _text_at(address: int, owner: Any) -> str:
    size, pointer = _pair(MEMORY, address + 8)
    return str(MEMORY[pointer : pointer + size], "utf-8") if size else ""


def _number_list_reader(name: str, arrays: bool) -> Reader:
    _, code, dtype = _SCALARS[name]
    step = _SIZE // np.dtype(dtype).itemsize
    first = 8 // np.dtype(dtype).itemsize
    few = [_repeated(f"8x{code}{24 - struct.calcsize('<' + code)}x", count) for count in range(_FEW + 1)]

    def column(size: int, pointer: int) -> Any:
        """The numbers where wasmtime keeps them: to be copied before the call returns."""
        return np.frombuffer(MEMORY[pointer : pointer + size * _SIZE], dtype)[first::step]

    def read_bytes(address: int, owner: Any) -> bytes:
        size, pointer = _pair(MEMORY, address + 8)
        return bytes(MEMORY[pointer : pointer + size * _SIZE])[8::_SIZE] if size else b""

    def read_array(address: int, owner: Any) -> Any:
        size, pointer = _pair(MEMORY, address + 8)
        return column(size, pointer).copy() if size else np.empty(0, dtype)

    def read_list(address: int, owner: Any) -> list[Any]:
        size, pointer = _pair(MEMORY, address + 8)
        if size <= _FEW:
            return list(few[size].unpack_from(MEMORY, pointer)) if size else []
        values: list[Any] = column(size, pointer).tolist()
        return values

    if name == "u8":
        return read_bytes
    return read_array if arrays else read_list


def _repeated(codes: str, count: int) -> struct.Struct:
    return struct.Struct("<" + codes * count)


def _list_reader(element: Reader) -> Reader:
    def read(address: int, owner: Any) -> list[Any]:
        size, pointer = _pair(MEMORY, address + 8)
        return [element(at, owner) for at in range(pointer, pointer + size * _SIZE, _SIZE)]

    return read


def _tuple_reader(items: Sequence[Reader]) -> Reader:
    plan = [(item, _SIZE * index) for index, item in enumerate(items)]

    def read(address: int, owner: Any) -> tuple[Any, ...]:
        pointer = WORDS[(address >> 3) + 2]
        return tuple([item(pointer + offset, owner) for item, offset in plan])

    return read


def _record_reader(kind: type[tuple[Any, ...]], fields: Sequence[Reader]) -> Reader:
    plan = [(field, _ENTRY_BYTES * index + 16) for index, field in enumerate(fields)]

    def read(address: int, owner: Any) -> tuple[Any, ...]:
        pointer = WORDS[(address >> 3) + 2]
        return kind(*[field(pointer + offset, owner) for field, offset in plan])

    return read


def _option_reader(payload: Reader) -> Reader:
    def read(address: int, owner: Any) -> Any:
        pointer = WORDS[(address >> 3) + 1]
        return payload(pointer, owner) if pointer else None

    return read


def _result_reader(ok: Reader | None, err: Reader | None) -> Reader:
    def read(address: int, owner: Any) -> Any:
        is_ok, pointer = MEMORY[address + 8], WORDS[(address >> 3) + 2]
        reader = ok if is_ok else err
        payload = reader(pointer, owner) if reader is not None else None
        return payload if is_ok else Refused(payload)

    return read


def _variant_reader(cases: dict[str, Reader | None]) -> Reader:
    def read(address: int, owner: Any) -> Case:
        name = _text_at(address, owner)
        reader = cases[name]
        return Case(name, None if reader is None else reader(WORDS[(address >> 3) + 3], owner))

    return read


def _read_flags(address: int, owner: Any) -> frozenset[str]:
    size, pointer = _pair(MEMORY, address + 8)
    return frozenset(_text_at(at - 8, owner) for at in range(pointer, pointer + size * 16, 16))


def _handle_reader(owned: bool) -> Reader:
    handle, host = c_void_p(), c_void_p()
    found = ctypes.byref(host)

    def read(address: int, owner: Any) -> Any:
        """Looks the handle's number up; that ends a borrow, which wasmtime insists on before we return."""
        handle.value = WORDS[(address >> 3) + 1]
        error = _to_host(owner.context_argument, handle, found)
        if error:
            raise GuestStopped(f"a handle of this program was not made by this host: {reason_of(error)}")
        number = _host_number(host)
        _host_delete(host)
        return owner.handles.take(number) if owned else owner.handles.objects[number]

    return read


# --- writing -----------------------------------------------------------------------------------------------------


def _data_at(address: int) -> int:
    """The data pointer of the vector that a value holds."""
    data: int = WORDS[(address >> 3) + 2]
    return data


def _primitive_writer(name: str) -> Writer:
    if name == "string":
        return _write_string
    if name == "char":
        return _write_char
    kind, code, _ = _SCALARS[name]
    put = struct.Struct("<B7x" + code).pack_into

    def write(address: int, value: Any, owner: Any) -> None:
        put(MEMORY, address, kind, value)

    return write


def _write_string(address: int, value: str, owner: Any) -> None:
    data = value.encode()
    _bytes_new(address + 8, len(data), data)
    MEMORY[address] = _STRING


def _write_char(address: int, value: str, owner: Any) -> None:
    _put_head(MEMORY, address, _CHAR, ord(value))


def _number_list_writer(name: str) -> Writer:
    kind, code, dtype = _SCALARS[name]
    itemsize = np.dtype(dtype).itemsize
    few = [_repeated(f"B7x{code}{24 - itemsize}x", count) for count in range(_FEW + 1)]

    def pack(value: Any) -> bytes:
        if len(value) <= _FEW:
            mixed: list[Any] = [kind] * (2 * len(value))
            mixed[1::2] = value
            return few[len(value)].pack(*mixed)
        values = np.zeros(len(value) * (_SIZE // itemsize), dtype)
        values[8 // itemsize :: _SIZE // itemsize] = _in_range(value, dtype)
        values.view("u1")[::_SIZE] = kind
        return values.tobytes()

    def write(address: int, value: Any, owner: Any) -> None:
        raw = pack(value)
        _list_new(address + 8, len(value))
        if raw:
            data = _data_at(address)
            MEMORY[data : data + len(raw)] = raw
        MEMORY[address] = _LIST

    return write


def _in_range(value: Any, dtype: str) -> Any:
    """Like struct for short lists, refuses numbers that do not fit instead of wrapping them."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return np.frombuffer(value, "u1")
    if isinstance(value, np.ndarray) and (value.dtype == dtype or value.dtype.kind == "f"):
        return value.astype(dtype, copy=False, casting="same_kind")
    return np.array(value.tolist() if isinstance(value, np.ndarray) else value, dtype)


def _list_writer(element: Writer) -> Writer:
    def write(address: int, value: Sequence[Any], owner: Any) -> None:
        _list_new(address + 8, len(value))
        data = _data_at(address)
        for index, item in enumerate(value):
            element(data + index * _SIZE, item, owner)
        MEMORY[address] = _LIST

    return write


def _tuple_writer(items: Sequence[Writer]) -> Writer:
    def write(address: int, value: Sequence[Any], owner: Any) -> None:
        if len(value) != len(items):
            raise TypeError(f"a tuple of {len(items)} is expected, {len(value)} values were given")
        _tuple_new(address + 8, len(items))
        data = _data_at(address)
        for index, (item, inner) in enumerate(zip(items, value, strict=True)):
            item(data + index * _SIZE, inner, owner)
        MEMORY[address] = _TUPLE

    return write


def _record_writer(fields: Sequence[tuple[str, str, Writer]]) -> Writer:
    encoded = [(name.encode(), attribute, writer) for name, attribute, writer in fields]

    def write(address: int, value: Any, owner: Any) -> None:
        inner = value if isinstance(value, tuple) else [getattr(value, name) for _, name, _ in encoded]
        if len(inner) != len(encoded):
            raise TypeError(f"a record of {len(encoded)} fields is expected, {len(inner)} values were given")
        _record_new(address + 8, len(encoded))
        data = _data_at(address)
        for index, (name, _, writer) in enumerate(encoded):
            entry = data + index * _ENTRY_BYTES
            _bytes_new(entry, len(name), name)
            writer(entry + 16, inner[index], owner)
        MEMORY[address] = _RECORD

    return write


def _boxed(writer: Writer) -> Callable[[Any, Any], int]:
    """Writes a value into scratch memory and moves it into a box of wasmtime's."""
    scratch = (ctypes.c_uint64 * (_SIZE // 8))()
    address, argument = ctypes.addressof(scratch), ctypes.byref(scratch)

    def box(value: Any, owner: Any) -> int:
        scratch[0] = 0
        writer(address, value, owner)
        boxed: int = _box(argument)
        return boxed

    return box


def _option_writer(payload: Writer) -> Writer:
    box = _boxed(payload)

    def write(address: int, value: Any, owner: Any) -> None:
        _put_head(MEMORY, address, _OPTION, 0 if value is None else box(value, owner))

    return write


def result_parts(kind: ResultOf, converters: Converters) -> tuple[Writer, Writer]:
    """(writer of an ok value, writer of an err value) for a function's result."""
    err = None if kind.err is None else converters.writer(kind.err)
    match kind.ok:
        case Primitive(name) if name in _SCALARS:
            return _number_side_writer(name), _side_writer(err, 0)
    ok = None if kind.ok is None else converters.writer(kind.ok)
    return _side_writer(ok, 1), _side_writer(err, 0)


def ok_kind_of(function: Function) -> int:
    """wasmtime's kind of the number that a function gives, if it gives one."""
    match function.result:
        case ResultOf(Primitive(name), _) if name in _SCALARS:
            return _SCALARS[name][0]
    return 0


def _number_side_writer(name: str) -> Writer:
    """The ok side of a number, as every turn of a loop gets it: in one go."""
    kind, code, _ = _SCALARS[name]
    put = struct.Struct("<B7x" + code).pack_into
    scratch = (ctypes.c_uint64 * (_SIZE // 8))()
    argument = ctypes.byref(scratch)

    def write(address: int, value: Any, owner: Any) -> None:
        put(scratch, 0, kind, value)
        _put_result(MEMORY, address, _RESULT, 1, _box(argument))

    return write


def _side_writer(payload: Writer | None, is_ok: int) -> Writer:
    if payload is None:
        return _empty_side_writer(is_ok)
    box = _boxed(payload)

    def write(address: int, value: Any, owner: Any) -> None:
        _put_result(MEMORY, address, _RESULT, is_ok, box(value, owner))

    return write


def _empty_side_writer(is_ok: int) -> Writer:
    def write(address: int, value: Any, owner: Any) -> None:
        _put_result(MEMORY, address, _RESULT, is_ok, 0)

    return write


def _result_writer(ok: Writer | None, err: Writer | None) -> Writer:
    """A result inside another value: `Refused(payload)` is its error side."""
    write_ok, write_err = _side_writer(ok, 1), _side_writer(err, 0)

    def write(address: int, value: Any, owner: Any) -> None:
        if isinstance(value, Refused):
            write_err(address, value.payload, owner)
        else:
            write_ok(address, value, owner)

    return write


def _variant_writer(cases: dict[str, Writer | None]) -> Writer:
    boxes = {name: None if writer is None else _boxed(writer) for name, writer in cases.items()}

    def write(address: int, value: Any, owner: Any) -> None:
        name, payload = value
        box = boxes[name]
        pointer = 0 if box is None else box(payload, owner)
        encoded = name.encode()
        _bytes_new(address + 8, len(encoded), encoded)
        WORDS[(address >> 3) + 3] = pointer
        MEMORY[address] = _VARIANT

    return write


def _enum_writer(cases: frozenset[str]) -> Writer:
    def write(address: int, value: str, owner: Any) -> None:
        if value not in cases:
            raise ValueError(f"{value!r} is none of {', '.join(sorted(cases))}")
        encoded = value.encode()
        _bytes_new(address + 8, len(encoded), encoded)
        MEMORY[address] = _ENUM

    return write


def _write_flags(address: int, value: Any, owner: Any) -> None:
    names = [name.encode() for name in value]
    _flags_new(address + 8, len(names))
    data = _data_at(address)
    for index, name in enumerate(names):
        _bytes_new(data + index * 16, len(name), name)
    MEMORY[address] = _FLAGS


def _handle_writer(type_id: int) -> Writer:
    def write(address: int, value: Any, owner: Any) -> None:
        host, resource = c_void_p(_host_new(True, owner.handles.add(value), type_id)), c_void_p()
        error = _from_host(owner.context_argument, host, ctypes.byref(resource))
        _host_delete(host)
        if error:
            raise GuestStopped(f"the program's handle table refused a new handle: {reason_of(error)}")
        _put_head(MEMORY, address, _RESOURCE, resource.value)

    return write
