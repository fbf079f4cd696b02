"""The key/value header of a GGUF file, as plain Python values.

The `gguf` library wraps every array element in numpy objects: 1.6 s for the 98,000 strings of a 49k vocabulary,
where this reader takes about 0.06 s. It reads no tensors; a header that points outside the file is refused.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pie_core.errors import LoadError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DEPTH = 4  # arrays of arrays; real files use one level
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufMetadata:
    """What a GGUF file says about itself, with typed access to single keys."""

    path: Path
    values: dict[str, Any]

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._typed(key, str, default))

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._typed(key, int, default))

    def flag(self, key: str, default: bool | None = None) -> bool:
        return bool(self._typed(key, bool, default))

    def strings(self, key: str) -> list[str]:
        return self._array(key, str)

    def integers(self, key: str) -> list[int]:
        return self._array(key, int)

    def floats(self, key: str) -> list[float]:
        return self._array(key, float)

    def _array(self, key: str, kind: type) -> list[Any]:
        found: list[Any] = self._typed(key, list, None)
        if found and not isinstance(found[0], kind):  # all items of a GGUF array have one type
            raise LoadError(
                f"{self.path}: {key!r} holds {type(found[0]).__name__}, expected {kind.__name__} in the GGUF header"
            )
        return found

    def _typed(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise LoadError(f"{self.path}: the GGUF header has no {key!r}")
        if not isinstance(value, kind):
            raise LoadError(
                f"{self.path}: {key!r} is a {type(value).__name__}, expected {kind.__name__} in the GGUF header"
            )
        return value

    @cached_property
    def tokenizer_model(self) -> str:
        return self.text("tokenizer.ggml.model")


def read_gguf_metadata(path: Path | str) -> GgufMetadata:
    """Reads the header of the file at `path`; raises LoadError when it is not a whole GGUF header."""
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return GgufMetadata(path, _Reader(data, path).header())
    except OSError as exc:
        raise LoadError(f"{path}: the GGUF file cannot be read: {exc.strerror or exc}") from exc
    except ValueError as exc:  # mmap of an empty file
        raise LoadError(f"{path}: the GGUF file cannot be read: {exc}") from exc


class _Reader:
    """A cursor over the mapped file; every step checks that it stays inside."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._size = len(data)
        self._path = path
        self._at = 0

    def header(self) -> dict[str, Any]:
        if self._bytes(4) != _MAGIC:
            raise LoadError(f"{self._path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise LoadError(
                f"{self._path}: GGUF version {version} is not supported; expected one of {_VERSIONS}"
            )
        self._scalar("Q")  # the tensor count
        return dict(self._pair() for _ in range(self._count(self._scalar("Q"), smallest=13)))

    def _pair(self) -> tuple[str, Any]:
        key = self._string()
        return key, self._value(self._scalar("I"), depth=0)

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth + 1)
        return self._scalar(self._format(kind))

    def _array(self, depth: int) -> list[Any]:
        kind, count = self._scalar("I"), self._scalar("Q")
        if depth > _MAX_DEPTH:
            raise self._broken(f"arrays nested deeper than {_MAX_DEPTH}")
        if kind == _STRING:
            return self._strings(self._count(count, smallest=8))
        if kind == _ARRAY:
            return [self._array(depth + 1) for _ in range(self._count(count, smallest=12))]
        item = self._format(kind)
        raw = self._bytes(self._count(count, smallest=struct.calcsize(item)) * struct.calcsize("<" + item))
        return list(struct.unpack(f"<{count}{item}", raw))

    def _strings(self, count: int) -> list[str]:
        """The hot loop: a vocabulary is one array of this kind."""
        data, at, size, unpack = self._data, self._at, self._size, _LENGTH.unpack_from
        found: list[str] = []
        for _ in range(count):
            if at + 8 > size:
                raise self._broken(f"an array of {count} strings runs past its end at byte {size}")
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > size:
                raise self._broken(
                    f"a string of {at - start} bytes from byte {start} on runs past its end at byte {size}"
                )
            found.append(data[start:at].decode())
        self._at = at
        return found

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode()

    def _scalar(self, item: str) -> Any:
        return struct.unpack("<" + item, self._bytes(struct.calcsize("<" + item)))[0]

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._broken(f"value type {kind} is unknown")
        return _SCALARS[kind]

    def _count(self, count: int, smallest: int) -> int:
        if count * smallest > self._size - self._at:
            raise self._broken(f"{count} items cannot fit in the rest of the file")
        return count

    def _bytes(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > self._size:
            raise self._broken(f"{count} bytes at offset {start} run past its end")
        return self._data[start : self._at]

    def _broken(self, what: str) -> LoadError:
        return LoadError(
            f"{self._path}: the GGUF header is damaged: {what} (file of {self._size} bytes, offset {self._at}); "
            "fetch the file again"
        )
