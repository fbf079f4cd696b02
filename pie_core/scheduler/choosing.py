"""What the next step computes: passes that wait, rows of the cohort, and, if room is left, what nobody has asked for.

Passes and rows share the step's tokens and requests as `scheduler.policy` says, and take their pages here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pie_core.contracts.driver import DriverCapabilities
from pie_core.contracts.forward import NO_PREFIX_GROUPS, Int64, PrefixGroups
from pie_core.engine.options import EngineOptions
from pie_core.engine.suspensions import Suspensions
from pie_core.scheduler.batching import take_chunk
from pie_core.scheduler.cohort import Cohort, Ripe
from pie_core.scheduler.fairness import in_turns
from pie_core.scheduler.policy import Policy
from pie_core.scheduler.prefixes import Prefixes
from pie_core.scheduler.request import Chunk, Pass, Readiness
from pie_core.scheduler.run_ahead import RunAhead
from pie_core.scheduler.shared_reads import SharedReads

TRIED_IN_VAIN = 32  # of those that would come, in one step: a long queue must not be gone through for each
MOST_OVERTAKEN = 8  # then whoever lacks room is the next to come


@dataclass(frozen=True, slots=True)
class Chosen:
    """Chunks of passes, and behind them the next row of places in the cohort."""

    chunks: Sequence[Chunk]
    places: Int64
    prefixes: PrefixGroups = NO_PREFIX_GROUPS

    def __len__(self) -> int:
        return len(self.chunks) + len(self.places)


class Chooser:
    def __init__(
        self,
        can: DriverCapabilities,
        options: EngineOptions,
        suspensions: Suspensions,
        prefixes: Prefixes,
        ahead: RunAhead,
        cohort: Cohort,
    ) -> None:
        self.stalled = False  # nothing runs, and what waits lacks pages
        # Requests of the latest step, and those that wait for another; of one that prompts make long, none.
        self._last_size = self._continued = 0
        self._left_some = False  # the latest choice did not take all that waited
        self._suspensions = suspensions
        self._prefixes = prefixes
        self._ahead = ahead
        self._cohort = cohort
        self._shared = SharedReads(can.cache, cohort)
        self._policy = Policy(
            max_tokens=min(options.max_batch_tokens, can.max_batch_tokens),
            max_requests=min(options.max_batch_requests, can.max_batch_requests),
        )

    def choose(self, waiting: dict[Pass, None], *, is_idle: bool) -> Chosen:
        """Takes what it chooses out of those that wait; nothing, where that is better than half a step."""
        ripe, rows = self._ahead.ripe(), self._cohort.ripe()
        if not is_idle and 2 * (len(ripe) + rows.following + self._continued) < self._last_size:
            return _NOTHING  # what runs and what waits would take turns in half-empty steps from now on
        passes = self._ready(waiting) if waiting else []
        chunks, places = self._fill(passes, ripe, rows)
        if not chunks and not len(places) and is_idle and waiting:
            passes = self._ready(waiting, all_of_them=True)
            chunks = self._policy.choose(passes, take_chunk, overtake=True)
        self.stalled = bool(waiting) and is_idle and not chunks and not len(places)
        for chunk in chunks:
            waiting.pop(chunk.running, None)
            chunk.running.in_flight += 1
        self._left_some = bool(waiting)
        return Chosen(*self._shared.arrange(chunks, places))

    def _ready(self, waiting: Iterable[Pass], *, all_of_them: bool = False) -> list[Pass]:
        """Those that are on the device now and have something to compute: all that are there, and of those that would
        come the first in line, as many as a step can take."""
        there, coming = self._suspensions.begin_choice(waiting, is_short=self._left_some)
        self._prefixes.begin_choice()
        ready = [each for each in there if self._readiness(each) is Readiness.READY]
        if all_of_them:
            return ready + [each for each in coming if self._readiness(each) is Readiness.READY]
        if len(coming) <= TRIED_IN_VAIN:
            return ready + list(self._first_ready(in_turns(coming), sys.maxsize, sys.maxsize))
        lines: tuple[list[Pass], list[Pass]] = [], []  # long passes do not keep short ones out of a step
        for each in coming:
            lines[each.remaining <= each.indivisible].append(each)
        limits = self._policy.max_tokens, self._policy.max_requests
        return ready + [each for line in lines for each in self._first_ready(in_turns(line), *limits)]

    def _first_ready(self, line: Iterable[Pass], tokens: int, requests: int) -> Iterator[Pass]:
        """Those that have to wait for room are overtaken by others that need less, but not again and again."""
        tries, earlier, is_next = TRIED_IN_VAIN, list[Pass](), False
        for each in line:
            if is_next or min(tokens, requests, tries) <= 0:
                return
            readiness = self._readiness(each)
            if readiness is Readiness.READY:
                tokens, requests = tokens - each.remaining, requests - 1
                yield each
            else:
                tries -= 1
            if not each.is_coming:
                for one in earlier:
                    one.overtaken += 1
                    is_next |= one.overtaken >= MOST_OVERTAKEN
            elif readiness is not Readiness.JOINS:
                earlier.append(each)
                is_next |= each.overtaken >= MOST_OVERTAKEN

    def _readiness(self, waiting: Pass) -> Readiness:
        if not self._suspensions.is_on_device(waiting):
            return Readiness.NO_ROOM
        return self._prefixes.readiness(waiting)

    def _fill(self, passes: list[Pass], ripe: list[Pass], rows: Ripe) -> tuple[list[Chunk], Int64]:
        asked = passes + [self._ahead.guess(each) for each in ripe if each.generation is not None]
        first, later = self._policy.beside(asked, rows.asked, self._cohort.order)
        places, scarce = self._cohort.take(first)
        are_all = len(places) == len(rows.asked)
        room = self._policy.room_for_guesses(asked, len(places)) if are_all else 0
        guesses = [self._ahead.guess(each) for each in ripe if each.generation is None][:room]
        ahead = self._cohort.in_turn(rows.guesses, room - len(guesses))
        policy = self._policy.without(len(places) + len(guesses) + len(ahead))
        chunks = policy.choose(asked, take_chunk, overtake=False) if asked else []
        if not are_all:
            others = np.concatenate([scarce, later])[: policy.room_behind(chunks)]
            places = np.concatenate([places, self._cohort.take_scarce(others)])
        elif len(chunks) == len(asked) or not policy.room_behind(chunks):  # nobody lacks pages
            chunks += [chunk for each in guesses if (chunk := take_chunk(each, each.remaining))]
            places = np.concatenate([places, self._cohort.take(ahead)[0]])
        return chunks, places

    def submitted(self, chosen: Chosen) -> None:
        """It is at the driver."""
        prompts = sum(chunk.stop - chunk.start for chunk in chosen.chunks if chunk.is_long)
        self._last_size = 0 if prompts >= self._policy.many else len(chosen)
        self._continued = sum(not chunk.is_last for chunk in chosen.chunks)


_NOTHING = Chosen((), np.empty(0, np.int64))
