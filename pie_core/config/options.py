"""The options of a plugin: kept as they stand in the file until the plugin's own type reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from pie_core.config.places import Place
from pie_core.config.validation import parse

T = TypeVar("T")

_ANYWHERE = Place("driver options")


class Options(Mapping[str, object]):
    """What stands under `options:`, with the place where it stands."""

    __slots__ = ("_values", "place")

    def __init__(self, values: Mapping[str, object] | None = None, place: Place = _ANYWHERE) -> None:
        self._values = dict(values or {})
        self.place = place

    def __getitem__(self, key: str) -> object:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Options({self._values!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        keys = core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema())
        return core_schema.no_info_after_validator_function(cls, keys)


def parse_options(cls: type[T], options: Mapping[str, object], place: Place | None = None) -> T:
    """`options` as the frozen dataclass `cls` that a plugin declares, or a ConfigError with file, line and key.

    Options that came from a file know their place; for a plain mapping, `place` says where it came from.
    """
    known = options.place if isinstance(options, Options) else _ANYWHERE
    return parse(cls, dict(options), place or known)
