"""Values survive the way through wasmtime's C values and back."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.sandbox.converters import Case, Converters, Refused, record_class
from pie_core.sandbox.fibers import VALUE_BYTES, c_function
from pie_core.sandbox.wit_types import (
    Enum,
    Flags,
    ListOf,
    OptionOf,
    Primitive,
    Record,
    ResultOf,
    TupleOf,
    Type,
    Variant,
)

CONVERTERS = Converters(lambda resource: 1)
free = c_function("wasmtime_component_val_delete", None, ctypes.c_void_p)


def through(kind: Type, value: Any, arrays: bool = False) -> Any:
    """Writes, reads back and frees: with a wrong layout this crashes or differs."""
    memory = ctypes.create_string_buffer(VALUE_BYTES)
    address = ctypes.addressof(memory)
    CONVERTERS.writer(kind)(address, value, None)
    result = CONVERTERS.reader(kind, arrays)(address, None)
    free(address)
    return result


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Refused) and isinstance(second, Refused):
        return same(first.payload, second.payload)
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low = -(1 << (bits - 1)) if signed else 0
    return st.integers(low, low + (1 << bits) - 1)


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "f32": st.floats(width=32),
    "f64": st.floats(),
    "string": st.text(st.characters(exclude_categories=["Cs"])),
    "char": st.characters(exclude_categories=["Cs"]),
    **{f"{sign}{bits}": integers(bits, sign == "s") for sign in "su" for bits in (8, 16, 32, 64)},
}
primitives = st.sampled_from(sorted(VALUES)).map(Primitive)
names = st.sampled_from(["first", "second", "third-one"])


def is_no_result(kind: Type) -> bool:
    """`Refused` says which side, so a result as the ok of a result has no Python value of its own."""
    return not isinstance(kind, ResultOf)


def compound(inner: st.SearchStrategy[Type]) -> st.SearchStrategy[Type]:
    fields = st.lists(st.tuples(names, inner), min_size=1, max_size=3, unique_by=lambda field: field[0])
    cases = st.lists(
        st.tuples(names, st.none() | inner), min_size=1, max_size=3, unique_by=lambda case: case[0]
    )
    return st.one_of(
        inner.map(ListOf),
        inner.map(OptionOf),
        st.lists(inner, min_size=1, max_size=3).map(lambda items: TupleOf(tuple(items))),
        fields.map(lambda chosen: Record("some-record", tuple(chosen))),
        cases.map(lambda chosen: Variant("some-variant", tuple(chosen))),
        st.builds(ResultOf, st.none() | inner.filter(is_no_result), st.none() | inner),
        st.just(Enum("e", ("red", "light-blue"))),
        st.just(Flags("f", ("read", "write", "run"))),
    )


types = st.recursive(primitives, compound, max_leaves=5)


def values(kind: Type | None) -> st.SearchStrategy[Any]:
    match kind:
        case None:
            return st.none()
        case Primitive(name):
            return VALUES[name]
        case ListOf(Primitive("u8")):
            return st.binary(max_size=40)
        case ListOf(element):
            return st.lists(values(element), max_size=20)
        case OptionOf(payload):
            return st.none() | values(payload)
        case TupleOf(items):
            return st.tuples(*map(values, items))
        case Record(_, fields):
            return st.tuples(*(values(inner) for _, inner in fields)).map(
                lambda parts: record_class(kind)(*parts)
            )
        case Variant(_, cases):
            return st.one_of([st.builds(Case, st.just(name), values(inner)) for name, inner in cases])
        case ResultOf(ok, err):
            return values(ok) | values(err).map(Refused)
        case Enum(_, labels):
            return st.sampled_from(labels)
        case Flags(_, labels):
            return st.frozensets(st.sampled_from(labels))
    raise AssertionError(kind)


@settings(max_examples=150, deadline=None)
@given(types.flatmap(lambda kind: st.tuples(st.just(kind), values(kind))))
def test_any_value_of_any_type_comes_back(example: tuple[Type, Any]) -> None:
    kind, value = example
    assert same(through(kind, value), value)


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"string", "char", "u8"}))
@pytest.mark.parametrize("count", [0, 1, 16, 17, 1000])
def test_lists_of_numbers_come_back_as_lists_or_arrays(name: str, count: int) -> None:
    value: list[Any] = [index % 2 == 0 if name == "bool" else index % 100 for index in range(count)]
    kind = ListOf(Primitive(name))
    assert through(kind, value) == value
    array = through(kind, np.array(value), arrays=True)
    assert isinstance(array, np.ndarray)
    assert array.tolist() == value


def test_bytes_cross_as_a_list_of_u8() -> None:
    data = bytes(range(256)) * 10
    assert through(ListOf(Primitive("u8")), data) == data


@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_numbers_that_do_not_fit_are_refused_and_not_wrapped(count: int, value: int) -> None:
    for given_values in ([value] * count, np.array([value] * count)):
        with pytest.raises(Exception, match=r"range|bounds|requires|format"):
            through(ListOf(Primitive("u32")), given_values)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Enum("e", ("a", "b")), "c"),
        (TupleOf((Primitive("u8"), Primitive("u8"))), (1,)),
        (Record("r", (("x", Primitive("u8")),)), (1, 2)),
        (Variant("v", (("a", None),)), Case("b")),
        (Primitive("string"), b"bytes"),
    ],
)
def test_a_value_of_another_type_is_refused(kind: Type, value: Any) -> None:
    with pytest.raises((TypeError, ValueError, KeyError, AttributeError)):
        through(kind, value)


def test_a_record_may_be_given_as_any_object_with_its_fields() -> None:
    class Event:
        token = 7
        finish_reason = "stop"

    record = Record("event", (("token", Primitive("u32")), ("finish-reason", Primitive("string"))))
    assert through(record, Event()) == (7, "stop")
    assert through(record, Event()).finish_reason == "stop"


def test_arguments_of_numbers_only_are_read_in_one_go() -> None:
    kinds = [Primitive("u32"), Primitive("f64"), Primitive("bool"), Primitive("s8")]
    memory = ctypes.create_string_buffer(VALUE_BYTES * len(kinds))
    for index, (kind, value) in enumerate(zip(kinds, (7, 0.5, True, -3), strict=True)):
        CONVERTERS.writer(kind)(ctypes.addressof(memory) + index * VALUE_BYTES, value, None)
    assert tuple(CONVERTERS.arguments(kinds)(ctypes.addressof(memory), None)) == (7, 0.5, True, -3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_arguments_of_any_kind_are_read_however_many_there_are(count: int) -> None:
    text, number = Primitive("string"), Primitive("u32")
    every: list[Type] = [text, number, ListOf(number), text, number]
    kinds = every[:count]
    values = ["first", 2, [3], "fourth", 5][:count]
    memory = ctypes.create_string_buffer(VALUE_BYTES * count)
    address = ctypes.addressof(memory)
    for index, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        CONVERTERS.writer(kind)(address + index * VALUE_BYTES, value, None)
    assert list(CONVERTERS.arguments(kinds)(address, None)) == values
    for index in range(count):
        free(address + index * VALUE_BYTES)
