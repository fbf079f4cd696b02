"""What may cross to the host: values are checked against the bindings' annotations before they do.

The bindings end the whole program on a value that its WIT type cannot hold; here it becomes an InvalidRequest.
"""

from __future__ import annotations

import types
import typing
from array import array
from collections.abc import Callable
from typing import Any

from inferlet.errors import InvalidRequest

Check = Callable[[Any], None]

_U32 = range(2**32)
_U64 = range(2**64)
_S32 = range(-(2**31), 2**31)
# The annotations say int for all; numbers of these functions have another range than u32.
_RANGES = {
    **dict.fromkeys(("Sampler.seed", "timer", "wait"), _U64),
    **dict.fromkeys(("ForwardPass.timeout_ns", "Generation.timeout_ns"), _U64),
    **dict.fromkeys(("Context.priority", "ForwardPass.priority", "Generation.priority"), _S32),
}

_checks: dict[object, tuple[tuple[str, Check], ...]] = {}


def check_arguments(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Raises InvalidRequest that names the parameter, what was given and what is taken."""
    target = getattr(function, "__func__", function)
    checks = _checks.get(target)
    if checks is None:
        checks = _checks[target] = _checks_of(target)
    for (name, check), argument in zip(checks, arguments, strict=False):
        try:
            check(argument)
        except ValueError as misfit:
            raise InvalidRequest(f"{name}: {misfit}") from None


def _checks_of(function: Any) -> tuple[tuple[str, Check], ...]:
    hints = getattr(function, "__annotations__", {})
    numbers = _RANGES.get(getattr(function, "__qualname__", ""), _U32)
    return tuple((name, _check_for(hint, numbers)) for name, hint in hints.items() if name != "return")


def _check_for(hint: Any, numbers: range) -> Check:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = _check_for(next(kind for kind in arguments if kind is not type(None)), numbers)
        return lambda value: None if value is None else inner(value)
    if origin is list:
        return _list_check(arguments[0], numbers)
    simple: dict[Any, Check] = {int: _integer_check(numbers), float: _check_float, str: _check_text}
    return simple.get(hint, _accept)


def _list_check(kind: Any, numbers: range) -> Check:
    check = _check_for(kind, numbers)

    def check_list(values: Any) -> None:
        if not isinstance(values, list):
            raise ValueError(f"expected a list, not {type(values).__name__}")
        if kind is int and _are_small(values):
            return
        for value in values:
            check(value)

    return check_list


def _are_small(values: list[Any]) -> bool:
    """Whether all are 32-bit numbers, at the speed of C."""
    try:
        array("I", values)
    except (OverflowError, TypeError):
        return False
    return True


def _integer_check(numbers: range) -> Check:
    def check(value: Any) -> None:
        if not isinstance(value, int) or value not in numbers:
            raise ValueError(f"{value!r} is not a whole number from {numbers[0]} to {numbers[-1]}")

    return check


def _check_float(value: Any) -> None:
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")


def _check_text(value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"expected text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at {error.start}: not Unicode") from None


def _accept(value: Any) -> None:
    """Resources and enums come from the bindings themselves."""
