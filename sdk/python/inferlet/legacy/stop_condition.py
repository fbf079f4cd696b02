"""When a generation of the older API ends: conditions over the tokens generated so far, joined by `or_`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopCondition:
    """Ends at a number of tokens, or when the tokens end with one of these sequences."""

    max_tokens: int | None = None
    endings: tuple[tuple[int, ...], ...] = ()

    def or_(self, other: StopCondition) -> StopCondition:
        """Ends as soon as either would."""
        limits = [limit for limit in (self.max_tokens, other.max_tokens) if limit is not None]
        return StopCondition(min(limits, default=None), self.endings + other.endings)

    def check(self, tokens: Sequence[int]) -> bool:
        """True if these generated tokens are the end."""
        if self.max_tokens is not None and len(tokens) >= self.max_tokens:
            return True
        return self.ending_of(tokens) is not None

    def ending_of(self, tokens: Sequence[int]) -> tuple[int, ...] | None:
        """The sequence that these tokens end with, if it is one to end at."""
        for ending in self.endings:
            if tuple(tokens[-len(ending) :]) == ending:
                return ending
        return None

    def stop_tokens(self) -> list[int] | None:
        """The endings as single tokens; None if one of them is longer."""
        if any(len(ending) != 1 for ending in self.endings):
            return None
        return [ending[0] for ending in self.endings]


def max_len(count: int) -> StopCondition:
    """Ends after this many tokens."""
    return StopCondition(max_tokens=count)


def ends_with(tokens: Iterable[int]) -> StopCondition:
    """Ends with this sequence, which is not part of the text."""
    return ends_with_any([list(tokens)])


def ends_with_any(sequences: Iterable[Sequence[int]]) -> StopCondition:
    """Ends with any of these sequences, which are not part of the text."""
    endings = tuple(tuple(sequence) for sequence in sequences)
    return StopCondition(endings=tuple(ending for ending in endings if ending))
