"""Calls between the ranks of one model as bytes: a length, a call and its arguments, arrays as they lie in memory."""

from __future__ import annotations

import struct
from dataclasses import fields, is_dataclass
from typing import IO, Any

import msgspec
import numpy as np

from pie_core.contracts import forward

_ARRAY = 1
_LENGTH = struct.Struct("<Q")
_CLASSES = {
    each.__name__: each
    for each in (
        forward.ForwardBatch,
        forward.TokenRefs,
        forward.PageTable,
        forward.StateTable,
        forward.AttentionMasks,
        forward.Samplers,
        forward.Probes,
        forward.MediaSpans,
        forward.PrefixGroups,
    )
}


def write_call(pipe: IO[bytes], name: str, *arguments: Any) -> None:
    body = msgspec.msgpack.encode(
        [name, [_plain(each) for each in arguments]],
    )
    pipe.write(_LENGTH.pack(len(body)) + body)
    pipe.flush()


def read_call(pipe: IO[bytes]) -> tuple[str, list[Any]] | None:
    """None at the end of the stream, be it within a call: who wrote it has ended."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = pipe.read(length)
    if len(body) < length:
        return None
    name, arguments = msgspec.msgpack.decode(body, ext_hook=_decode_array)
    return name, [_rebuilt(each) for each in arguments]


def _plain(value: Any) -> Any:
    """Dataclasses by their name, arrays with their dtype and shape."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "class": type(value).__name__,
            "fields": [_plain(getattr(value, f.name)) for f in fields(value)],
        }
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, np.ndarray):
        header = msgspec.msgpack.encode([value.dtype.str, list(value.shape)])
        return msgspec.msgpack.Ext(_ARRAY, struct.pack("<H", len(header)) + header + value.tobytes())
    return value.item() if isinstance(value, np.generic) else value


def _decode_array(code: int, data: memoryview) -> Any:
    assert code == _ARRAY
    (size,) = struct.unpack_from("<H", data)
    dtype, shape = msgspec.msgpack.decode(data[2 : 2 + size])
    return np.frombuffer(bytes(data[2 + size :]), dtype).reshape(shape)


def _rebuilt(value: Any) -> Any:
    if isinstance(value, dict) and "class" in value:
        return _CLASSES[value["class"]](*(_tupled(_rebuilt(each)) for each in value["fields"]))
    if isinstance(value, list):
        return [_rebuilt(each) for each in value]
    return value


def _tupled(value: Any) -> Any:
    """The only sequences inside a batch are tuples."""
    return tuple(value) if isinstance(value, list) else value
