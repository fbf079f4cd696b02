"""WIT text -> typed signatures: what each host function takes and gives, and under which import name.

Reads the subset of WIT that we write: packages, interfaces, resources, records, enums, flags, variants, aliases,
`use`, functions, and worlds (whose exports become an interface of their own).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pie_core.sandbox.wit_types import (
    Enum,
    Flags,
    Function,
    Handle,
    InterfaceSignature,
    ListOf,
    OptionOf,
    Primitive,
    Record,
    ResultOf,
    TupleOf,
    Type,
    Variant,
)

WIT_FOLDER = Path(__file__).parent.parent / "wit"

PRIMITIVES = frozenset(
    ["bool", "s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64", "f32", "f64", "char", "string"]
)


class WitError(Exception):
    """WIT text of ours that cannot be read: a fault of this program, not of a guest."""


@cache
def our_interfaces() -> Mapping[str, InterfaceSignature]:
    """Every interface of pie_core/wit by its path (`inferlet:api/forward`), and each world's exports by its name."""
    return read_wit(path.read_text(encoding="utf-8") for path in sorted(WIT_FOLDER.glob("*.wit")))


def read_wit(
    texts: Iterable[str], known: Mapping[str, InterfaceSignature] | None = None
) -> dict[str, InterfaceSignature]:
    """The interfaces of several files of one or more packages; `use` may reach into `known`."""
    sources = [_Source(text) for text in texts]
    reader = _Reader(dict(known or {}), {block.path: block for source in sources for block in source.blocks})
    for path in list(reader.blocks):
        reader.interface(path)
    return {path: reader.done[path] for path in reader.blocks}


_TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\s+|->|[%]?[A-Za-z][A-Za-z0-9-]*|[0-9]+(?:\.[0-9]+)*[A-Za-z0-9.-]*|.", re.S
)


def _tokens(text: str) -> Iterator[str]:
    for match in _TOKEN.finditer(text):
        token = match.group()
        if not token.isspace() and not token.startswith(("//", "/*")):
            yield token.removeprefix("%")


class _Cursor:
    """A position in a list of tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self.tokens[index] if index < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def expect(self, wanted: str) -> None:
        seen = self.take()
        if seen != wanted:
            near = " ".join(self.tokens[max(0, self.at - 8) : self.at + 4])
            raise WitError(f"WIT: expected {wanted!r}, saw {seen!r} near: {near}")

    def accept(self, wanted: str) -> bool:
        if self.peek() != wanted:
            return False
        self.at += 1
        return True

    def separated(self, end: str) -> Iterator[None]:
        """Yields before each item of a comma-separated list, and takes its end."""
        while not self.accept(end):
            yield
            if not self.accept(","):
                self.expect(end)
                return

    def until(self, end: str) -> str:
        taken = []
        while self.peek() != end:
            taken.append(self.take())
        self.take()
        return "".join(taken)


@dataclass(slots=True)
class _Block:
    package: str
    version: str
    name: str
    tokens: list[str]

    @property
    def path(self) -> str:
        return f"{self.package}/{self.name}"


class _Source:
    """One file cut into its interface and world blocks."""

    def __init__(self, text: str) -> None:
        self.blocks: list[_Block] = []
        cursor = _Cursor(list(_tokens(text)))
        cursor.expect("package")
        package, _, version = cursor.until(";").partition("@")
        while cursor.peek():
            if cursor.take() not in ("interface", "world"):
                raise WitError(
                    f"WIT of {package}: expected interface or world near {cursor.tokens[cursor.at - 1]!r}"
                )
            self.blocks.append(_Block(package, version, cursor.take(), _braced(cursor)))


def _braced(cursor: _Cursor) -> list[str]:
    cursor.expect("{")
    start, depth = cursor.at, 1
    while depth:
        depth += {"{": 1, "}": -1}.get(cursor.take(), 0)
    return cursor.tokens[start : cursor.at - 1]


class _Reader:
    """Reads blocks in the order in which they use one another."""

    def __init__(self, done: dict[str, InterfaceSignature], blocks: dict[str, _Block]) -> None:
        self.done = done
        self.blocks = blocks

    def interface(self, path: str) -> InterfaceSignature:
        if path not in self.done:
            if path not in self.blocks:
                raise WitError(f"WIT: {path} is used and defined nowhere; known: {', '.join(self.blocks)}")
            block = self.blocks[path]
            signature = InterfaceSignature(block.package, block.version, block.name)
            _BlockReader(self, signature, _Cursor(block.tokens)).read()
            self.done[path] = signature
        return self.done[path]


class _BlockReader:
    """Reads the statements of one interface or world."""

    def __init__(self, reader: _Reader, signature: InterfaceSignature, cursor: _Cursor) -> None:
        self.reader = reader
        self.signature = signature
        self.cursor = cursor
        self.statements: dict[str, Callable[[], None]] = {
            "use": self._use,
            "type": self._alias,
            "record": self._record,
            "variant": self._variant,
            "enum": self._enum,
            "flags": self._flags,
            "resource": self._resource,
            "export": self._export,
            "import": self._skip,
            "include": self._skip,
        }

    def read(self) -> None:
        self._declare_resources()
        while word := self.cursor.take():
            statement = self.statements.get(word)
            if statement is not None and self.cursor.peek() != ":":
                statement()
            else:
                self._function(word, word, ())

    def _declare_resources(self) -> None:
        """Ahead of everything else, because functions may stand before the resources they use."""
        tokens = self.cursor.tokens
        for word, name, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if word == "resource" and after in ("{", ";"):
                self.signature.resources[name] = f"{self.signature.path}.{name}"

    def _skip(self) -> None:
        self.cursor.until(";")

    def _use(self) -> None:
        path = self.cursor.until("{").rstrip(".").partition("@")[0]
        if "/" not in path:
            path = f"{self.signature.package}/{path}"
        source = self.reader.interface(path)
        for _ in self.cursor.separated("}"):
            name = self.cursor.take()
            local = self.cursor.take() if self.cursor.accept("as") else name
            self._bring_in(source, name, local)
        self.cursor.expect(";")

    def _bring_in(self, source: InterfaceSignature, name: str, local: str) -> None:
        if name in source.resources:
            self.signature.resources[local] = source.resources[name]
        elif name in source.types:
            self.signature.types[local] = source.types[name]
        else:
            raise WitError(f"WIT: {self.signature.path} uses {name!r}, which {source.path} does not define")

    def _alias(self) -> None:
        name = self.cursor.take()
        self.cursor.expect("=")
        target = self.cursor.peek()
        if target in self.signature.resources:
            self.signature.resources[name] = self.signature.resources[self.cursor.take()]
        else:
            self.signature.types[name] = self._type()
        self.cursor.expect(";")

    def _record(self) -> None:
        name = self._open()
        fields = []
        for _ in self.cursor.separated("}"):
            label = self.cursor.take()
            self.cursor.expect(":")
            fields.append((label, self._type()))
        self.signature.types[name] = Record(name, tuple(fields))

    def _variant(self) -> None:
        name = self._open()
        cases: list[tuple[str, Type | None]] = []
        for _ in self.cursor.separated("}"):
            label = self.cursor.take()
            payload = None
            if self.cursor.accept("("):
                payload = self._type()
                self.cursor.expect(")")
            cases.append((label, payload))
        self.signature.types[name] = Variant(name, tuple(cases))

    def _enum(self) -> None:
        name = self._open()
        self.signature.types[name] = Enum(name, self._labels())

    def _flags(self) -> None:
        name = self._open()
        self.signature.types[name] = Flags(name, self._labels())

    def _open(self) -> str:
        name = self.cursor.take()
        self.cursor.expect("{")
        return name

    def _labels(self) -> tuple[str, ...]:
        return tuple(self.cursor.take() for _ in self.cursor.separated("}"))

    def _resource(self) -> None:
        resource = self.cursor.take()
        if self.cursor.accept(";"):
            return
        self.cursor.expect("{")
        while not self.cursor.accept("}"):
            self._member(resource, self.cursor.take())

    def _member(self, resource: str, name: str) -> None:
        key = self.signature.resources[resource]
        if name == "constructor":
            self._constructor(resource, key)
        elif self.cursor.peek(1) == "static":
            self._function(f"{resource}.{name}", f"[static]{resource}.{name}", ())
        else:
            self._function(
                f"{resource}.{name}", f"[method]{resource}.{name}", (("self", Handle(key, False)),)
            )

    def _constructor(self, resource: str, key: str) -> None:
        name = f"[constructor]{resource}"
        params = self._params()
        self.cursor.expect(";")
        self.signature.functions[name] = Function(name, name, params, Handle(key, True))

    def _export(self) -> None:
        name = self.cursor.take()
        self._function(name, name, ())

    def _function(self, name: str, import_name: str, before: tuple[tuple[str, Type], ...]) -> None:
        self.cursor.expect(":")
        self.cursor.accept("static")
        self.cursor.expect("func")
        params = before + self._params()
        result = self._type() if self.cursor.accept("->") else None
        self.cursor.expect(";")
        self.signature.functions[import_name] = Function(name, import_name, params, result)

    def _params(self) -> tuple[tuple[str, Type], ...]:
        self.cursor.expect("(")
        params = []
        for _ in self.cursor.separated(")"):
            name = self.cursor.take()
            self.cursor.expect(":")
            params.append((name, self._type()))
        return tuple(params)

    def _type(self) -> Type:
        name = self.cursor.take()
        if name in PRIMITIVES:
            return Primitive(name)
        if name in ("list", "option", "tuple", "borrow", "own"):
            return self._generic(name)
        if name == "result":
            return self._result()
        if name in self.signature.resources:
            return Handle(self.signature.resources[name], True)
        if name in self.signature.types:
            return self.signature.types[name]
        raise WitError(f"WIT: {self.signature.path} names the type {name!r} before it is defined")

    def _generic(self, name: str) -> Type:
        self.cursor.expect("<")
        items = tuple(self._type() for _ in self.cursor.separated(">"))
        match name:
            case "list":
                return ListOf(items[0])
            case "option":
                return OptionOf(items[0])
            case "tuple":
                return TupleOf(items)
        assert isinstance(items[0], Handle)
        return replace(items[0], owned=name == "own")

    def _result(self) -> Type:
        sides: list[Type | None] = []
        if self.cursor.accept("<"):
            for _ in self.cursor.separated(">"):
                sides.append(None if self.cursor.accept("_") else self._type())
        return ResultOf(sides[0] if sides else None, sides[1] if len(sides) > 1 else None)
