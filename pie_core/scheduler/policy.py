"""Who goes first: what needs one row before what needs many, and among equals whoever has waited longest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pie_core.contracts.forward import Int64
from pie_core.scheduler.fairness import in_turns
from pie_core.scheduler.request import Chunk, Pass

# Takes up to so many rows of a pass into the step; None where it has to wait for pages.
Take = Callable[[Pass, int], Chunk | None]
# Passes and rows of the cohort in their turns: numbers of the passes, and behind them those of the rows.
Order = Callable[[Sequence[Pass], Int64], Int64]
Candidate = tuple[Pass, int]  # a pass and how many rows it has left


@dataclass(frozen=True, slots=True)
class Policy:
    """Round robin: a pass that ran a step and needs another queues up behind the others. Where not all fit into a step,
    higher priorities come first, and among equals tenants and their programs take turns.

    Short passes (decoding) come first, so that a long prompt does not hold up everybody's next token, and behind them
    guesses, without which a loop would have a row in every other step only. A quarter of the tokens and of the requests
    is kept for prompts, so that decoding does not starve them.
    """

    max_tokens: int
    max_requests: int

    def choose(self, waiting: Iterable[Pass], take: Take, *, overtake: bool) -> list[Chunk]:
        """The chunks of the next step. `overtake`: prompts may start while an earlier one waits for pages."""
        waiting = list(waiting)
        if not self.max_requests:
            return []
        if self._compete(waiting):
            waiting = list(in_turns(waiting))
        return self._choose(waiting, take, overtake)

    def beside(self, waiting: Sequence[Pass], places: Int64, order: Order) -> tuple[Int64, Int64]:
        """Which of the cohort's rows go into a step with these passes, and, in turn, those that do if room is left."""
        if not len(places) or (not waiting and len(places) <= min(self.max_requests, self.max_tokens)):
            return places, _NO_PLACES
        short = [each for each in waiting if each.remaining <= each.indivisible]
        tokens, requests = self._for_short(len(waiting) - len(short))
        if len(short) < len(waiting) and self._keeps_nothing:
            short, requests = list(waiting), 1
        count = len(short) + len(places)
        if count <= requests and sum(each.remaining for each in short) + len(places) <= tokens:
            return places, _NO_PLACES
        mixed = order(short, places)
        places = places[mixed[mixed >= len(short)] - len(short)]
        count = int(np.count_nonzero(mixed[: min(requests, tokens)] >= len(short)))
        return places[:count], places[count:]

    def room_for_guesses(self, waiting: Sequence[Pass], rows: int) -> int:
        """For so many, beside these of the cohort's rows and the short ones of those that wait."""
        short = [each.remaining for each in waiting if each.remaining <= each.indivisible]
        if self._keeps_nothing and len(short) < len(waiting):
            return 0
        tokens, requests = self._for_short(len(waiting) - len(short))
        return max(min(tokens - sum(short), requests - len(short)) - rows, 0)

    def without(self, rows: int) -> Policy:
        """What is left beside so many rows of the cohort."""
        return Policy(self.max_tokens - rows, self.max_requests - rows) if rows else self

    def room_behind(self, chunks: Sequence[Chunk]) -> int:
        """For so many rows."""
        return max(min(self._left_by(chunks)), 0)

    @property
    def many(self) -> int:
        """A step of so many rows of prompts takes long for their sake."""
        return max(self.max_tokens // 4, 1)

    @property
    def _keeps_nothing(self) -> bool:
        """A step is too small to keep a part of it for prompts."""
        return self.max_requests == 1 or self.max_tokens < 4

    def _for_short(self, long: int) -> tuple[int, int]:
        """Tokens and requests for short passes, so many long ones waiting."""
        if not long:
            return self.max_tokens, self.max_requests
        kept = min(long, max(self.max_requests // 4, 1))
        return self.max_tokens - self.max_tokens // 4, self.max_requests - kept

    def _compete(self, waiting: Sequence[Pass]) -> bool:
        """Not all fit into the step, or some are to have pages before others."""
        if len(waiting) > self.max_requests or sum(each.remaining for each in waiting) > self.max_tokens:
            return True
        return any(each.priority != waiting[0].priority for each in waiting)

    def _choose(self, waiting: Iterable[Pass], take: Take, overtake: bool) -> list[Chunk]:
        candidates = [(each, each.remaining) for each in waiting]
        short = [each for each in candidates if each[1] <= each[0].indivisible]
        if len(short) == len(candidates):
            return list(_fill(short, take, self.max_tokens, self.max_requests, overtake=True))
        if self._keeps_nothing:  # strictly in turn
            return list(_fill(candidates, take, self.max_tokens, 1, overtake=True))
        long = [each for each in candidates if each[1] > each[0].indivisible]
        chosen = list(_fill(short, take, *self._for_short(len(long)), overtake=True))
        chosen += _fill(long, take, *self._left_by(chosen), overtake=overtake)
        if len(chosen) < min(
            len(candidates), self.max_requests
        ):  # prompts lack pages, or fit into few requests
            taken = {each.running for each in chosen}
            rest = [each for each in short if each[0] not in taken]
            chosen += _fill(rest, take, *self._left_by(chosen), overtake=True)
        return chosen

    def _left_by(self, chosen: Sequence[Chunk]) -> tuple[int, int]:
        """Tokens and requests."""
        return self.max_tokens - sum(each.stop - each.start for each in chosen), self.max_requests - len(
            chosen
        )


_NO_PLACES: Int64 = np.empty(0, np.int64)


def _fill(
    candidates: Iterable[Candidate], take: Take, tokens: int, requests: int, *, overtake: bool
) -> Iterator[Chunk]:
    for each, remaining in candidates:
        if tokens <= 0 or requests <= 0:
            return
        rows = remaining if remaining <= tokens else splittable_rows(each, remaining, tokens)
        chunk = take(each, rows) if rows else None
        if chunk is not None:
            tokens -= chunk.stop - chunk.start
            requests -= 1
            yield chunk
        elif rows and not overtake:
            return


def splittable_rows(each: Pass, remaining: int, tokens: int) -> int:
    """How many rows of a pass fit into `tokens` without splitting what belongs together; 0 = none."""
    return max(min(tokens, remaining - each.indivisible), 0)
