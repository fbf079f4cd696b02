"""Small guests in WebAssembly text, whose imports are written from pie_core/wit.

`wat_guest(body, calls=["poll/wait"])` is a component of the world `inferlet` (or another): `body` holds core functions
that import from "host" by the WIT's import names, and must export `run` (ptr, len) -> area.
"""

from __future__ import annotations

from collections.abc import Sequence

import wasmtime

from pie_core.sandbox.signatures import our_interfaces
from pie_core.sandbox.wit_types import (
    Enum,
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
)

PACKAGE = "inferlet:api"
OPTIONS = '(memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))'

LIBC = """
  (core module $libc_module
    (memory (export "memory") 2)
    (global $top (mut i32) (i32.const 65536))
    (func (export "realloc") (param $old i32) (param $old_size i32) (param $align i32) (param $size i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get $size)))
      (block $fits
        (br_if $fits (i32.le_u (global.get $top) (i32.mul (memory.size) (i32.const 65536))))
        (br_if $fits (i32.ne (i32.const -1) (memory.grow
          (i32.add (i32.const 1) (i32.div_u (local.get $size) (i32.const 65536))))))
        unreachable)
      (local.get $at)))
  (core instance $libc (instantiate $libc_module))"""

# Areas in which `run` returns: none; the input itself; an error ("boom", "it broke").
RETURN_NONE = (
    "(i32.store8 (i32.const 16) (i32.const 0)) (i32.store8 (i32.const 20) (i32.const 0)) (i32.const 16)"
)
RETURN_INPUT = """(i32.store8 (i32.const 16) (i32.const 0)) (i32.store8 (i32.const 20) (i32.const 1))
  (i32.store (i32.const 24) (local.get $ptr)) (i32.store (i32.const 28) (local.get $len)) (i32.const 16)"""
RETURN_ERROR = """(i32.store8 (i32.const 16) (i32.const 1))
  (i32.store (i32.const 20) (i32.const 1000)) (i32.store (i32.const 24) (i32.const 5))
  (i32.store (i32.const 28) (i32.const 1010)) (i32.store (i32.const 32) (i32.const 8)) (i32.const 16)"""
ERROR_TEXT = '(data (i32.const 1000) "guest\\00\\00\\00\\00\\00it broke")'


def run(instructions: str, result: str = RETURN_NONE, locals_: str = "") -> str:
    """The core function `run`."""
    return f'(func (export "run") (param $ptr i32) (param $len i32) (result i32) {locals_}\n{instructions}\n{result})'


def wat_guest(
    body: str,
    calls: Sequence[str] = (),
    core_imports: str = "",
    drops: Sequence[str] = (),
    world: str = "inferlet",
    version: str = "1.0.0",
    extra: str = "",
    extra_lowered: str = "",
    extra_host: str = "",
) -> bytes:
    """`calls` and `drops` are "interface/import name" and "interface/resource"; `core_imports` declares them."""
    writer = _Writer(version)
    for call in calls:
        writer.want(*call.split("/", 1))
    for drop in drops:
        writer.want(drop.split("/")[0], None)
    text = f"""(component
  {writer.imports()}
  {extra}
  {LIBC}
  {_lowered(calls, drops)}
  {extra_lowered}
  (core module $program
    (import "libc" "memory" (memory 2))
    (import "libc" "realloc" (func $realloc (param i32 i32 i32 i32) (result i32)))
    {core_imports}
    {body})
  (core instance $host {_host(calls, drops)} {extra_host})
  (core instance $program (instantiate $program (with "libc" (instance $libc)) (with "host" (instance $host))))
  {_lifted(world)})"""
    return bytes(wasmtime.wat2wasm(text))


def _lowered(calls: Sequence[str], drops: Sequence[str]) -> str:
    lines = []
    for index, call in enumerate(calls):
        interface, name = call.split("/", 1)
        lines.append(f'(core func $call{index} (canon lower (func ${interface} "{name}") {OPTIONS}))')
    for index, drop in enumerate(drops):
        interface, resource = drop.split("/")
        lines.append(f'(alias export ${interface} "{resource}" (type $dropped{index}))')
        lines.append(f"(core func $drop{index} (canon resource.drop $dropped{index}))")
    return "\n  ".join(lines)


def _host(calls: Sequence[str], drops: Sequence[str]) -> str:
    exports = [f'(export "{call.split("/", 1)[1]}" (func $call{index}))' for index, call in enumerate(calls)]
    exports += [
        f'(export "drop {drop.split("/")[1]}" (func $drop{index}))' for index, drop in enumerate(drops)
    ]
    return " ".join(exports)


def _lifted(world: str) -> str:
    lines = []
    for name, function in our_interfaces()[f"{PACKAGE}/{world}"].functions.items():
        params = " ".join(f'(param "{label}" {_root_type(kind)})' for label, kind in function.params)
        assert function.result is not None
        lines.append(
            f'(func (export "{name}") {params} (result {_root_type(function.result)}) '
            f'(canon lift (core func $program "{name}") {OPTIONS}))'
        )
    return "\n  ".join(lines)


def _root_type(kind: Type) -> str:
    return _type_text(kind, lambda record: "$types_error")


class _Writer:
    """Imports of the interfaces that are wanted, each with only the functions that are called."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._wanted: dict[str, list[Function]] = {"types": []}

    def want(self, interface: str, name: str | None) -> None:
        signature = our_interfaces()[f"{PACKAGE}/{interface}"]
        functions = [signature.functions[name]] if name is not None else []
        for function in functions:
            for key in _resources_of(function):
                owner = key.partition("/")[2].partition(".")[0]
                if owner != interface:
                    self._wanted.setdefault(owner, [])
        self._wanted[interface] = self._wanted.pop(interface, []) + functions

    def imports(self) -> str:
        ordered = sorted(self._wanted, key=lambda name: (name != "types", bool(self._foreign(name)), name))
        return "\n  ".join(self._instance(name) for name in ordered)

    def _foreign(self, name: str) -> set[str]:
        path = f"{PACKAGE}/{name}."
        keys = {key for function in self._wanted[name] for key in _resources_of(function)}
        return {key for key in keys if not key.startswith(path)}

    def _instance(self, name: str) -> str:
        signature = our_interfaces()[f"{PACKAGE}/{name}"]
        local = {
            label: key for label, key in signature.resources.items() if key.startswith(f"{PACKAGE}/{name}.")
        }
        lines = [f'(export "{label}" (type ${label} (sub resource)))' for label in local]
        lines += [self._used_resource(key) for key in sorted(self._foreign(name))]
        lines += self._named_types(name, signature)
        lines += [_function_text(function) for function in self._wanted[name]]
        after = [f'(alias export ${name} "{label}" (type ${name}_{label}))' for label in local]
        if name == "types":
            after = ['(alias export $types "error" (type $types_error))']
        head = f'(import "{PACKAGE}/{name}@{self._version}" (instance ${name}'
        return "\n    ".join([head, *lines]) + "))\n  " + "\n  ".join(after)

    def _used_resource(self, key: str) -> str:
        owner, _, label = key.partition("/")[2].partition(".")
        alias = f"(alias outer 1 ${owner}_{label} (type $of_{label}))"
        return f'{alias} (export "{label}" (type ${label} (eq $of_{label})))'

    def _named_types(self, name: str, signature: InterfaceSignature) -> list[str]:
        if name == "types":
            return [
                '(type $e (record (field "code" string) (field "message" string)))',
                '(export "error" (type (eq $e)))',
            ]
        lines = ['(alias outer 1 $types_error (type $e)) (export "error" (type $error (eq $e)))']
        for label, kind in signature.types.items():
            if isinstance(kind, Enum):
                cases = " ".join(f'"{case}"' for case in kind.cases)
                lines.append(
                    f'(type $of_{label} (enum {cases})) (export "{label}" (type ${label} (eq $of_{label})))'
                )
        return lines


def _resources_of(function: Function) -> set[str]:
    found: set[str] = set()
    for kind in [*(inner for _, inner in function.params), function.result]:
        _collect(kind, found)
    return found


def _collect(kind: Type | None, found: set[str]) -> None:
    match kind:
        case Handle(resource, _):
            found.add(resource)
        case ListOf(inner) | OptionOf(inner):
            _collect(inner, found)
        case ResultOf(ok, err):
            _collect(ok, found)
            _collect(err, found)
        case TupleOf(items):
            for item in items:
                _collect(item, found)


def _function_text(function: Function) -> str:
    params = " ".join(f'(param "{label}" {_type_text(kind, _named)})' for label, kind in function.params)
    result = "" if function.result is None else f"(result {_type_text(function.result, _named)})"
    return f'(export "{function.import_name}" (func {params} {result}))'


def _named(kind: Record | Enum) -> str:
    return f"${kind.name}"


def _type_text(kind: Type, named: object) -> str:
    assert callable(named)
    match kind:
        case Primitive(name):
            return name
        case ListOf(element):
            return f"(list {_type_text(element, named)})"
        case OptionOf(payload):
            return f"(option {_type_text(payload, named)})"
        case TupleOf(items):
            return f"(tuple {' '.join(_type_text(item, named) for item in items)})"
        case ResultOf(ok, err):
            first = "" if ok is None else _type_text(ok, named)
            second = "" if err is None else f"(error {_type_text(err, named)})"
            return f"(result {first} {second})"
        case Handle(resource, owned):
            return f"({'own' if owned else 'borrow'} ${resource.rpartition('.')[2]})"
        case Record() | Enum():
            return str(named(kind))
    raise NotImplementedError(kind)
