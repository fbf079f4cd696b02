"""The types of WIT as values: what crosses between guest and host, and when two functions are the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Primitive:
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class ListOf:
    element: Type

    def __str__(self) -> str:
        return f"list<{self.element}>"


@dataclass(frozen=True, slots=True)
class OptionOf:
    payload: Type

    def __str__(self) -> str:
        return f"option<{self.payload}>"


@dataclass(frozen=True, slots=True)
class ResultOf:
    ok: Type | None
    err: Type | None

    def __str__(self) -> str:
        if self.err is None:
            return "result" if self.ok is None else f"result<{self.ok}>"
        return f"result<{self.ok or '_'}, {self.err}>"


@dataclass(frozen=True, slots=True)
class TupleOf:
    items: tuple[Type, ...]

    def __str__(self) -> str:
        return f"tuple<{', '.join(map(str, self.items))}>"


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    fields: tuple[tuple[str, Type], ...]

    def __str__(self) -> str:
        return f"record {{{', '.join(f'{name}: {kind}' for name, kind in self.fields)}}}"


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    cases: tuple[tuple[str, Type | None], ...]

    def __str__(self) -> str:
        shown = (name if kind is None else f"{name}({kind})" for name, kind in self.cases)
        return f"variant {{{', '.join(shown)}}}"


@dataclass(frozen=True, slots=True)
class Enum:
    name: str
    cases: tuple[str, ...]

    def __str__(self) -> str:
        return f"enum {{{', '.join(self.cases)}}}"


@dataclass(frozen=True, slots=True)
class Flags:
    name: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"flags {{{', '.join(self.names)}}}"


@dataclass(frozen=True, slots=True)
class Handle:
    """own<R> or borrow<R>; the resource is known by `package/interface.name`, or by "" when only its shape is known."""

    resource: str
    owned: bool

    def __str__(self) -> str:
        return f"{'own' if self.owned else 'borrow'}<{self.resource.rpartition('.')[2] or 'resource'}>"


Type: TypeAlias = (
    Primitive | ListOf | OptionOf | ResultOf | TupleOf | Record | Variant | Enum | Flags | Handle
)


@dataclass(frozen=True, slots=True)
class Function:
    """`name` as Interface.function registers it, `import_name` as components spell it."""

    name: str
    import_name: str
    params: tuple[tuple[str, Type], ...]
    result: Type | None

    def __str__(self) -> str:
        params = ", ".join(f"{name}: {kind}" for name, kind in self.params)
        return f"func({params})" + ("" if self.result is None else f" -> {self.result}")


@dataclass(frozen=True, slots=True)
class InterfaceSignature:
    """Functions by import name; `resources` maps every resource name in scope to its key."""

    package: str
    version: str
    name: str
    functions: dict[str, Function] = field(default_factory=dict)
    resources: dict[str, str] = field(default_factory=dict)
    types: dict[str, Type] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.package}/{self.name}"


def same_shape(first: Type | None, second: Type | None) -> bool:
    """Equal up to the names of resources and of the types themselves, which components do not carry."""
    return _shape(first) == _shape(second)


def same_function(first: Function, second: Function) -> bool:
    """Equal parameter types and result; parameter names are documentation."""
    params = [_shape(kind) for _, kind in first.params] == [_shape(kind) for _, kind in second.params]
    return params and same_shape(first.result, second.result)


def _shape(kind: Type | None) -> Type | None:
    """The type with every name that does not count removed."""
    match kind:
        case ListOf(element):
            return ListOf(_must(_shape(element)))
        case OptionOf(payload):
            return OptionOf(_must(_shape(payload)))
        case ResultOf(ok, err):
            return ResultOf(_shape(ok), _shape(err))
        case TupleOf(items):
            return TupleOf(tuple(_must(_shape(item)) for item in items))
        case Record(_, fields):
            return Record("", tuple((name, _must(_shape(inner))) for name, inner in fields))
        case Variant(_, cases):
            return Variant("", tuple((name, _shape(inner)) for name, inner in cases))
        case Enum() | Flags():
            return replace(kind, name="")
        case Handle(_, owned):
            return Handle("", owned)
    return kind


def _must(kind: Type | None) -> Type:
    assert kind is not None
    return kind
