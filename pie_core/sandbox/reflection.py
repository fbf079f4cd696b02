"""What a component says about its imports and exports, in the terms of `signatures`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import wasmtime
from wasmtime.component import (
    Component,
    ComponentInstanceType,
    FuncType,
    ListType,
    OptionType,
    RecordType,
    ResourceType,
    TupleType,
    ValType,
    VariantType,
)
from wasmtime.component import _types as component_types

from pie_core.sandbox.fibers import is_async
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

_PRIMITIVES: dict[type, str] = {
    component_types.Bool: "bool",
    component_types.S8: "s8",
    component_types.S16: "s16",
    component_types.S32: "s32",
    component_types.S64: "s64",
    component_types.U8: "u8",
    component_types.U16: "u16",
    component_types.U32: "u32",
    component_types.U64: "u64",
    component_types.F32: "f32",
    component_types.F64: "f64",
    component_types.Char: "char",
    component_types.String: "string",
}

ResourceName = Callable[[ResourceType], str]


@dataclass(frozen=True, slots=True)
class ImportedInstance:
    """One `package/interface@version` that a component imports, with what it wants from it."""

    name: str
    functions: dict[str, Function]
    resources: tuple[str, ...]
    asynchronous: frozenset[str]

    @property
    def path(self) -> str:
        return self.name.partition("@")[0]

    @property
    def version(self) -> str:
        return self.name.partition("@")[2]


@dataclass(frozen=True, slots=True)
class ComponentShape:
    """`bare` are imports that are no instances, which no world of ours has."""

    imports: tuple[ImportedInstance, ...]
    bare: tuple[str, ...]
    exports: dict[str, Function]
    asynchronous: frozenset[str]


def shape_of(engine: wasmtime.Engine, component: Component) -> ComponentShape:
    imports = {name: extern.ty for name, extern in component.type.imports(engine).items()}
    exports = {name: extern.ty for name, extern in component.type.exports(engine).items()}
    functions = {name: kind for name, kind in exports.items() if isinstance(kind, FuncType)}
    return ComponentShape(
        tuple(
            _instance(engine, name, kind)
            for name, kind in imports.items()
            if isinstance(kind, ComponentInstanceType)
        ),
        tuple(name for name, kind in imports.items() if isinstance(kind, FuncType)),
        {name: _function(name, kind, _unnamed) for name, kind in functions.items() if not is_async(kind)},
        frozenset(name for name, kind in functions.items() if is_async(kind)),
    )


def _instance(engine: wasmtime.Engine, name: str, instance: ComponentInstanceType) -> ImportedInstance:
    items = {label: extern.ty for label, extern in instance.exports(engine).items()}
    resources = {label: kind for label, kind in items.items() if isinstance(kind, ResourceType)}
    functions = {label: kind for label, kind in items.items() if isinstance(kind, FuncType)}

    def resource_name(kind: ResourceType) -> str:
        return next((label for label, known in resources.items() if known == kind), "")

    return ImportedInstance(
        name,
        {label: _function(label, kind, resource_name) for label, kind in functions.items()},
        tuple(resources),
        frozenset(label for label, kind in functions.items() if is_async(kind)),
    )


def _unnamed(kind: ResourceType) -> str:
    return ""


def _function(name: str, kind: FuncType, resource: ResourceName) -> Function:
    params = tuple((label, _type(inner, resource)) for label, inner in kind.params)
    result = kind.result
    return Function(name, name, params, None if result is None else _type(result, resource))


def _type(kind: ValType, resource: ResourceName) -> Type:
    def inner(part: ValType | None) -> Type | None:
        return None if part is None else _type(part, resource)

    if type(kind) in _PRIMITIVES:
        return Primitive(_PRIMITIVES[type(kind)])
    match kind:
        case ListType():
            return ListOf(_type(kind.element, resource))
        case OptionType():
            return OptionOf(_type(kind.payload, resource))
        case component_types.ResultType():
            return ResultOf(inner(kind.ok), inner(kind.err))
        case TupleType():
            return TupleOf(tuple(_type(item, resource) for item in kind.elements))
        case RecordType():
            return Record("", tuple((name, _type(field, resource)) for name, field in kind.fields))
        case VariantType():
            return Variant("", tuple((name, inner(payload)) for name, payload in kind.cases))
        case component_types.EnumType():
            return Enum("", tuple(kind.names))
        case component_types.FlagsType():
            return Flags("", tuple(kind.names))
        case component_types.OwnType() | component_types.BorrowType():
            return Handle(resource(kind.ty), isinstance(kind, component_types.OwnType))
    return Primitive(type(kind).__name__)  # streams, futures: equal to nothing we offer
