"""Tool calls in a model's own format. This version has none of it yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from inferlet.errors import not_in_this_version
from inferlet.model import Model


class Event:
    """What a batch of tokens meant."""

    @dataclass(frozen=True, slots=True)
    class Start:
        """A tool call begins."""

    @dataclass(frozen=True, slots=True)
    class Call:
        """A whole tool call."""

        name: str
        arguments: str


class Decoder:
    """Finds tool calls in generated tokens."""

    def __init__(self, model: Model) -> None:
        raise not_in_this_version("tools.Decoder")


def equip_prefix(model: Model, tools: Sequence[str | dict[str, Any]]) -> NoReturn:
    raise not_in_this_version("tools.equip_prefix")


def answer_prefix(model: Model, name: str, value: Any) -> NoReturn:
    raise not_in_this_version("tools.answer_prefix")


def native_matcher(model: Model, tools: Sequence[str | dict[str, Any]]) -> NoReturn:
    raise not_in_this_version("tools.native_matcher")
