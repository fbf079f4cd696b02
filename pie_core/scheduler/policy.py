"""Who goes first: what needs one row before what needs many, and among equals whoever has waited longest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pie_core.scheduler.request import Chunk, Pass

# Takes up to so many rows of a pass into the step; None where it has to wait for pages.
Take = Callable[[Pass, int], Chunk | None]


@dataclass(frozen=True, slots=True)
class Policy:
    """Round robin: a pass that ran a step and needs another queues up behind the others.

    Short passes (decoding) come first, so that a long prompt does not hold up everybody's next token; a quarter of the
    tokens is kept for prompts, so that decoding does not starve them.
    """

    max_tokens: int
    max_requests: int

    def choose(self, waiting: Iterable[Pass], take: Take, *, overtake: bool) -> list[Chunk]:
        """The chunks of the next step. `overtake`: later prompts may start while an earlier one waits for pages."""
        short: list[Pass] = []
        long: list[Pass] = []
        for each in waiting:
            (short if each.remaining <= each.indivisible else long).append(each)
        if self.max_requests == 1:
            return list(self._fill([*long, *short], take, self.max_tokens, 1, stop_early=False))
        kept_tokens, kept_requests = (self.max_tokens // 4, 1) if long else (0, 0)
        chosen = list(
            self._fill(
                short,
                take,
                self.max_tokens - kept_tokens,
                self.max_requests - kept_requests,
                stop_early=False,
            )
        )
        tokens = self.max_tokens - sum(each.stop - each.start for each in chosen)
        requests = self.max_requests - len(chosen)
        chosen += self._fill(long, take, tokens, requests, stop_early=not overtake)
        return chosen

    def _fill(
        self, candidates: list[Pass], take: Take, tokens: int, requests: int, *, stop_early: bool
    ) -> Iterator[Chunk]:
        for each in candidates:
            if tokens <= 0 or requests <= 0:
                return
            rows = rows_within(each, tokens)
            chunk = take(each, rows) if rows else None
            if chunk is not None:
                tokens -= chunk.stop - chunk.start
                requests -= 1
                yield chunk
            elif rows and stop_early:
                return


def rows_within(each: Pass, tokens: int) -> int:
    """How many rows of a pass fit into `tokens` without splitting what belongs together; 0 = none."""
    if each.remaining <= tokens:
        return each.remaining
    return max(min(tokens, each.remaining - each.indivisible), 0)
