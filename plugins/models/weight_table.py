"""A weight table: which tensors of a checkpoint become which parameters of a model, in five verbs.

    take    one tensor as it is              stack   equal tensors along a new first axis (experts)
    fuse    tensors joined along their rows  split   one tensor cut along its rows
    leave   tensors that the model has no use for, said aloud

Tensors that a format stores transposed, or with their rows in another order, say so at their `Source`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

Format = Literal["hf", "gguf"]
Join = Literal["take", "fuse", "stack", "interleave"]


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of a checkpoint: its name in each format and its shape in memory."""

    hf: str
    gguf: str
    shape: tuple[int, ...]
    hf_transposed: bool = False
    gguf_heads: int = 0  # > 0: GGUF keeps rotary pairs side by side inside each of so many heads
    keep_float32: bool = False  # routers choose by small differences, whatever dtype the model runs in

    def name(self, form: Format) -> str:
        return self.hf if form == "hf" else self.gguf

    def stored_shape(self, form: Format) -> tuple[int, ...]:
        turned = form == "hf" and self.hf_transposed
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if turned else self.shape


def hf_source(name: str, *shape: int, keep_float32: bool = False) -> Source:
    """A tensor of an architecture that does not read GGUF files."""
    return Source(name, name, shape, keep_float32=keep_float32)


@dataclass(frozen=True, slots=True)
class Entry:
    """Sources in, parameters out. More than one target only for split."""

    join: Join
    sources: tuple[Source, ...]
    targets: tuple[str, ...]
    rows: tuple[int, ...] = ()  # of each target, where there are several
    others: tuple[Entry, ...] = ()  # the same parameters, where a file stores them another way

    def fits(self, shapes: Mapping[str, tuple[int, ...]], form: Format) -> int:
        """How many of its tensors a checkpoint has, counting those of the right shape once more."""
        seen = [(shapes.get(source.name(form)), source.stored_shape(form)) for source in self.sources]
        return sum((found is not None) + (found == expected) for found, expected in seen)


@dataclass(slots=True)
class WeightTable:
    """The whole table of one model; every parameter and every tensor occurs once."""

    entries: list[Entry] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    other_names: dict[str, str] = field(default_factory=dict)

    def take(self, target: str, source: Source) -> None:
        self.entries.append(Entry("take", (source,), (target,)))

    def fuse(self, target: str, sources: Sequence[Source]) -> None:
        self.entries.append(Entry("fuse", tuple(sources), (target,)))

    def stack(self, target: str, sources: Sequence[Source]) -> None:
        self.entries.append(Entry("stack", tuple(sources), (target,)))

    def or_stacked(self, sources: Sequence[Source]) -> None:
        """What the last entry makes, other files store stacked: in one tensor, or in several, one of each in turn."""
        last = self.entries[-1]
        other = Entry("interleave" if len(sources) > 1 else "take", tuple(sources), last.targets)
        self.entries[-1] = replace(last, others=(*last.others, other))

    def either(self, target: str, *ways: Sequence[Source]) -> None:
        """Files store this in one of several ways, the most common first: one tensor is taken, several are stacked."""
        entries = [Entry("take" if len(way) == 1 else "stack", tuple(way), (target,)) for way in ways]
        self.entries.append(replace(entries[0], others=tuple(entries[1:])))

    def split(self, rows: Mapping[str, int], source: Source) -> None:
        assert sum(rows.values()) == source.shape[0]
        self.entries.append(Entry("take", (source,), tuple(rows), tuple(rows.values())))

    def leave(self, *patterns: str) -> None:
        """Tensors with names like these (`*` and `?` as in file names) are not read."""
        self.left.extend(patterns)

    def also_called(self, other: str, ours: str) -> None:
        """Some files begin names with `other` where the table says `ours`."""
        self.other_names[other] = ours

    def known_name(self, stored: str) -> str:
        """How the table names a tensor that a checkpoint stores under this name."""
        for other, ours in self.other_names.items():
            if stored.startswith(other):
                return ours + stored.removeprefix(other)
        return stored

    def resolved(self, shapes: Mapping[str, tuple[int, ...]], form: Format) -> WeightTable:
        """The table for a checkpoint of these tensors: where files store something in several ways, its own."""
        entries = [
            max((entry, *entry.others), key=lambda way: way.fits(shapes, form)) for entry in self.entries
        ]
        return WeightTable(entries, self.left, self.other_names)

    def sources(self) -> Iterator[Source]:
        for entry in self.entries:
            yield from entry.sources

    def is_left(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.left)
