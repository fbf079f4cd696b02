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

_U32 = 2**32 - 1
_U64 = 2**64 - 1
_WIDE = {"Sampler.seed", "timer", "wait"}  # these take 64-bit numbers; the annotations say int for both

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
    largest = _U64 if getattr(function, "__qualname__", "") in _WIDE else _U32
    return tuple((name, _check_for(hint, largest)) for name, hint in hints.items() if name != "return")


def _check_for(hint: Any, largest: int) -> Check:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = _check_for(next(kind for kind in arguments if kind is not type(None)), largest)
        return lambda value: None if value is None else inner(value)
    if origin is list:
        return _list_check(arguments[0], largest)
    simple: dict[Any, Check] = {int: _integer_check(largest), float: _check_float, str: _check_text}
    return simple.get(hint, _accept)


def _list_check(kind: Any, largest: int) -> Check:
    check = _check_for(kind, largest)

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


def _integer_check(largest: int) -> Check:
    def check(value: Any) -> None:
        if not isinstance(value, int) or not 0 <= value <= largest:
            raise ValueError(f"{value!r} is not a whole number from 0 to {largest}")

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
