"""A place in a configuration: file, line and key path, as every error about it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pie_core.errors import ConfigError

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """('models', 0, 'name') as people write it: models[0].name."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


@dataclass(frozen=True, slots=True)
class Place:
    source: str
    path: KeyPath = ()
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False)

    def at(self, *keys: str | int) -> Place:
        return replace(self, path=(*self.path, *keys))

    def beside(self, key: str) -> Place:
        """Another key of the same section."""
        return replace(self, path=(*self.path[:-1], key))

    @property
    def line(self) -> int | None:
        """The line of this key, or of the nearest key around it that the file has."""
        for end in range(len(self.path), -1, -1):
            if self.path[:end] in self.lines:
                return self.lines[self.path[:end]]
        return None

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        return f"{place}: {dotted(self.path)}" if self.path else place

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self}: {problem}")
