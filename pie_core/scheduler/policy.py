"""Who goes first: what needs one row before what needs many, and among equals whoever has waited longest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pie_core.scheduler.fairness import in_turns
from pie_core.scheduler.request import Chunk, Pass

# Takes up to so many rows of a pass into the step; None where it has to wait for pages.
Take = Callable[[Pass, int], Chunk | None]
Candidate = tuple[Pass, int]  # a pass and how many rows it has left


@dataclass(frozen=True, slots=True)
class Policy:
    """Round robin: a pass that ran a step and needs another queues up behind the others. Where not all fit into a step,
    higher priorities come first, and among equals tenants and their programs take turns.

    Short passes (decoding) come first, so that a long prompt does not hold up everybody's next token; a quarter of the
    tokens is kept for prompts, so that decoding does not starve them.
    """

    max_tokens: int
    max_requests: int

    def choose(
        self, waiting: Iterable[Pass], take: Take, *, overtake: bool, guesses: Iterable[Pass] = ()
    ) -> list[Chunk]:
        """The chunks of the next step. `overtake`: prompts may start while an earlier one waits for pages.

        Guesses get what is left over, and only if nothing had to wait.
        """
        waiting = list(waiting)
        if self._compete(waiting):
            waiting = in_turns(waiting)
        chosen = self._choose(waiting, take, overtake)
        if len(chosen) == len(waiting):
            tokens = self.max_tokens - sum(each.stop - each.start for each in chosen)
            candidates = [(each, each.remaining) for each in guesses]
            chosen += _fill(candidates, take, tokens, self.max_requests - len(chosen), overtake=True)
        return chosen

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
        if self.max_requests == 1 or self.max_tokens < 4:  # nothing to keep for either: strictly in turn
            return list(_fill(candidates, take, self.max_tokens, 1, overtake=True))
        long = [each for each in candidates if each[1] > each[0].indivisible]
        tokens = self.max_tokens - self.max_tokens // 4
        chosen = list(_fill(short, take, tokens, self.max_requests - 1, overtake=True))
        tokens = self.max_tokens - sum(each.stop - each.start for each in chosen)
        chosen += _fill(long, take, tokens, self.max_requests - len(chosen), overtake=overtake)
        return chosen


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
