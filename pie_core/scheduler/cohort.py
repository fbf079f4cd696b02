"""The contexts that decode steadily, as rows of arrays: what a step costs does not grow by an object for each of them.

    a plain pass is submitted ──► join ──► its token is drawn ──► begin ──► ripe, taken, recorded, claimed … ──► leave

A row feeds itself: the token drawn last, known or still at the driver, is its next input. A generation goes on until it
ends; of a program that steps, up to `speculation_depth` rows run ahead of what it has asked for, and a step that feeds
what was drawn claims the next of them. Whatever else happens to a context, it leaves first: its history, pages and
counts are then what they would be without cohort, and its pass waits like any other. Results of steps that it left
behind are ignored.

    flushed ── claimed ── written ─────── submitted ── goal        history, asked for, results are here, at the driver
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from pie_core.contracts.driver import DriverCapabilities, Feature
from pie_core.contracts.forward import Bool, Int32, Int64
from pie_core.engine.context import Context
from pie_core.engine.options import EngineOptions
from pie_core.ids import ContextId, RequestId, Ticket
from pie_core.kv_pages.context_pages import Cache, ContextPages
from pie_core.scheduler.columns import NOBODY, Columns
from pie_core.scheduler.fairness import turn_order
from pie_core.scheduler.prefixes import Prefixes
from pie_core.scheduler.request import MIN_P, TEMPERATURE, TOP_K, TOP_P, Pass, SampleRows, Settings
from pie_core.scheduler.row_pages import RowPages

_MOST_STOPS = 64
_RING = 256


@dataclass(frozen=True, slots=True)
class RowStep:
    """What one step computes of the cohort: one row of each of these places."""

    places: Int64
    stamps: Int64
    rows: Int32

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True, slots=True)
class Ripe:
    """The places whose next row can be computed."""

    asked: Int64
    guesses: Int64  # of rows that nobody has asked for yet
    following: int  # those of both that continue what runs, or has just run


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step gave to those that are still here: a token each, and the rows that are written now."""

    places: Int64
    tokens: Int32
    written: Int32

    def of(self, chosen: Bool) -> Drawn:
        return Drawn(self.places[chosen], self.tokens[chosen], self.written[chosen])


# Takes back a pass that somebody waits for; for a Step, when it was asked for.
Resume = Callable[[Pass, float | None], None]


class Cohort:
    """`resume` takes back the pass of a context that leaves while somebody waits for it."""

    def __init__(
        self,
        can: DriverCapabilities,
        options: EngineOptions,
        cache: Cache,
        prefixes: Prefixes,
        number: Callable[[str], int],
        ages: Iterator[int],
    ) -> None:
        self.hits = self.misses = self.drops = 0  # as of RunAhead
        self.rows = 0  # computed by steps
        self.columns = Columns(_ring(options))
        self.resume: Resume  # set by whoever keeps the running passes
        self._mask = self.columns.tokens.shape[1] - 1
        self._is_open = all(space.group.kind in ("paged", "latent") for space in cache.spaces)
        self._refers = can.has(Feature.TICKET_TOKENS)
        self._can = can
        self._depth = options.speculation_depth
        self._longest = min((each.page_size * each.num_pages for each in cache.spaces), default=0)
        self._prefixes = prefixes
        self._number, self._ages = number, ages
        self._tenants: dict[str, int] = {}
        self.pages = RowPages(cache)
        self._contexts: list[Context | None] = []
        self._seats: dict[ContextId, int] = {}
        self._held: list[ContextPages | None] = []
        self._passes: list[Pass | None] = []
        self._free: list[int] = []
        self._turns = itertools.count(1)

    def __len__(self) -> int:
        return len(self._contexts) - len(self._free)

    def context_at(self, place: int) -> Context:
        context = self._contexts[place]
        assert context is not None
        return context

    def seats(self, contexts: Sequence[ContextId]) -> Int64:
        """Their places; -1 of those that are not here."""
        return np.fromiter(map(self._seats.get, contexts, itertools.repeat(-1)), np.int64, len(contexts))

    def contexts_at(self, places: Int64) -> list[Context]:
        taken = cast("list[Context]", self._contexts)  # those at these places are
        return [taken[place] for place in places.tolist()]

    # ---- coming

    def next_turn(self) -> int:
        return next(self._turns)

    def join(self, running: Pass) -> bool:
        """All rows of a pass are at the driver: what follows is computed here, if it is plain."""
        if not self._takes(running):
            return False
        place = self._place()
        context, columns = running.context, self.columns
        context.seat = self._seats[context.id] = place
        self._contexts[place], self._held[place], self._passes[place] = context, context.pages, running
        self.pages.enter(place, context.pages)
        self._note_owner(place, running)
        self._note_sampler(place, running)
        length = context.history.length
        columns.submitted[place] = columns.claimed[place] = columns.flushed[place] = length
        columns.written[place] = length - 1  # so that it is not, as long as the pass is at the driver
        columns.ticket[place], columns.sampler[place] = running.ticket, running.sampler
        columns.is_staged[place] = True
        columns.shift[place] = shift = context.history.position - length
        columns.bound[place] = min(self._can.max_model_len - max(shift, 0), self._longest)
        self._note_generation(place, running, length)
        return True

    def _takes(self, running: Pass) -> bool:
        context, samples, generation = running.context, running.samples, running.generation
        return (
            self._is_open
            and running.predictable
            and running.request is not None
            and running.ended is None
            and samples is not None
            and not samples.penalized
            and not samples.biases
            and not context.dropped
            and not context.evictions.evicted
            and context.raw is None
            and (generation is None or len(generation.stop_tokens) <= _MOST_STOPS)
        )

    def _place(self) -> int:
        if self._free:
            return self._free.pop()
        place = len(self._contexts)
        if place == self.columns.size:
            self.columns.grow()
        self._contexts.append(None)
        self._held.append(None)
        self._passes.append(None)
        return place

    def _note_owner(self, place: int, running: Pass) -> None:
        columns, context = self.columns, running.context
        columns.context[place] = context.id
        columns.process[place] = self._number(context.process)
        columns.tenant[place] = self._tenant(context.tenant)
        columns.priority[place] = running.priority
        columns.arrival[place] = running.arrival
        columns.turn[place] = next(self._turns)

    def _note_sampler(self, place: int, running: Pass) -> None:
        columns, samples = self.columns, running.samples
        assert samples is not None
        settings = samples.settings[0]
        columns.temperature[place], columns.top_k[place] = settings[TEMPERATURE], settings[TOP_K]
        columns.top_p[place], columns.min_p[place] = settings[TOP_P], settings[MIN_P]
        columns.stream[place] = samples.streams[0]
        columns.epoch[place] = running.context.epoch

    def _note_generation(self, place: int, running: Pass, length: int) -> None:
        columns, generation = self.columns, running.generation
        columns.request[place] = NOBODY
        columns.loops[place] = generation is not None
        if generation is None:
            columns.goal[place] = min(length + self._depth, int(columns.bound[place]))
            return
        stops = [token for token in generation.stop_tokens if 0 <= token < self._can.vocab_size]
        columns.widen_stops(len(stops))
        columns.stops[place] = -1
        columns.stops[place, : len(stops)] = stops
        columns.is_told[place] = not generation.whole
        columns.end[place] = end = generation.start + generation.max_tokens
        columns.goal[place] = end - 1  # what does not fit shows when it lacks a page

    def begin(self, running: Pass) -> bool:
        """The token of the pass that its context came with was drawn, and told. Whether the context is here."""
        context, columns = running.context, self.columns
        place = context.seat
        if place < 0:
            return False
        assert running.drawn is not None
        columns.claimed[place] = columns.flushed[place] = context.history.length
        columns.written[place] = context.written
        columns.tokens[place, context.written & self._mask] = running.drawn
        columns.is_staged[place] = False
        if running.generation is not None:
            assert running.request is not None
            columns.request[place] = running.request
        else:
            columns.priority[place] = context.priority
        return True

    # ---- a step

    def ripe(self) -> Ripe:
        columns = self.columns
        submitted, count = columns.submitted, len(self._contexts)
        can_go_on = submitted[:count] < columns.goal[:count]
        if not self._refers:
            can_go_on &= submitted[:count] == columns.written[:count]
        (places,) = can_go_on.nonzero()
        loops = columns.loops[places]
        looping = int(np.count_nonzero(loops))
        if looping == len(places):
            return Ripe(places, _NOBODY, looping)
        steps = places[~loops] if looping else places
        waiting = submitted[steps] < columns.claimed[steps]
        behind = int(np.count_nonzero(waiting))
        asked = places[loops] if looping else _NOBODY
        if behind:
            asked, steps = np.concatenate([asked, steps[waiting]]), steps[~waiting]
        return Ripe(asked, steps, len(places) - behind)

    def in_turn(self, places: Int64, count: int) -> Int64:
        """At most so many: those that no step has taken for longest."""
        if len(places) <= count:
            return places
        return places[np.argsort(self.columns.turn[places], kind="stable")[:count]]

    def take(self, places: Int64) -> tuple[Int64, Int64]:
        """Pages for their next rows: those that have them now, and those that lack one while memory is scarce."""
        lacking = self.pages.lacking(places, self.columns.submitted[places])
        if not any(map(len, lacking)) or self.pages.take(lacking, self._held):
            return places, _NOBODY
        lack = np.isin(places, np.concatenate(lacking))
        return places[~lack], places[lack]

    def take_scarce(self, places: Int64) -> Int64:
        """One after the other, higher priorities first. Whoever gets no page, and waits for nothing else, leaves."""
        columns, taken = self.columns, []
        for place in places[np.argsort(-columns.priority[places], kind="stable")].tolist():
            if self.pages.take(self.pages.lacking(np.array([place]), columns.submitted[[place]]), self._held):
                taken.append(place)
            elif columns.submitted[place] == columns.written[place]:
                self.leave(self.context_at(place))
        return np.array(taken, np.int64)

    def order(self, passes: Sequence[Pass], places: Int64) -> Int64:
        """The turns of passes and rows together."""
        columns = self.columns
        rows = [
            columns.priority[places],
            columns.tenant[places],
            columns.process[places],
            columns.turn[places],
        ]
        others: Int64 = np.array([self._keys(each) for each in passes], np.int64).reshape(-1, 4).T
        both = [np.concatenate([mine, theirs]) for mine, theirs in zip(others, rows, strict=True)]
        return turn_order(*both)

    def _keys(self, running: Pass) -> tuple[int, int, int, int]:
        tenant, process = running.context.tenant, running.context.process
        return running.priority, self._tenant(tenant), self._number(process), running.since

    def _tenant(self, name: str) -> int:
        return self._tenants.setdefault(name, len(self._tenants))

    def not_begun(self, places: Int64) -> RowStep:
        """The step that would have been."""
        return RowStep(places, self.columns.stamp[places], self.columns.submitted[places])

    def begun(self, places: Int64, ticket: Ticket, first_sampler: int) -> RowStep:
        """A step that computes their next rows is at the driver; samplers are in this order."""
        columns = self.columns
        step = self.not_begun(places)
        columns.submitted[places] = step.rows + 1
        columns.ticket[places] = ticket
        columns.sampler[places] = np.arange(first_sampler, first_sampler + len(places), dtype=np.int32)
        columns.turn[places] = next(self._turns)
        return step

    def record(self, step: RowStep, tokens: Int32) -> Drawn:
        """The step has ended well."""
        columns = self.columns
        self.rows += len(step)
        here = columns.stamp[step.places] == step.stamps
        drawn = Drawn(step.places, tokens, step.rows + 1)
        if np.count_nonzero(here) < len(step):
            drawn = drawn.of(here)
        columns.written[drawn.places] = drawn.written
        columns.tokens[drawn.places, drawn.written & self._mask] = drawn.tokens
        self._flush_fullest(drawn.places, drawn.written - columns.flushed[drawn.places])
        return drawn

    def _flush_fullest(self, places: Int64, unflushed: Int32) -> None:
        """Some of those whose ring is half full, so that all are in time: a thousand at once would hold a step up."""
        (full,) = (unflushed > (self._mask >> 1)).nonzero()
        if len(full):
            fullest_first = full[np.argsort(-unflushed[full], kind="stable")]
            steps_left = max((self._mask - int(unflushed[fullest_first[0]])) // 2, 1)
            for place in places[fullest_first[: -(-len(full) // steps_left)]].tolist():
                self._flush(place)

    def is_asked(self, place: int, row: int) -> bool:
        return bool(self.columns.loops[place] or row < self.columns.claimed[place])

    # ---- generations

    def extend(self, drawn: Drawn) -> tuple[Bool, Bool]:
        """The tokens are theirs, but for stop tokens: which are those, and which generations have all they want."""
        columns, places = self.columns, drawn.places
        stopped = np.logical_or.reduce(columns.stops[places] == drawn.tokens[:, None], axis=1)
        goes_on = ~stopped
        columns.claimed[places] = drawn.written + goes_on
        return stopped, goes_on & (drawn.written + 1 == columns.end[places])

    # ---- programs that step

    def claim(self, places: Int64, tokens: Int64, requests: Int64, *, are_steps: bool) -> Bool:
        """Which of these requests to feed a token, one of each context, the cohort serves."""
        columns = self.columns
        claimed, submitted = columns.claimed[places], columns.submitted[places]
        is_ahead = submitted > claimed
        fits: Bool = columns.tokens[places, claimed & self._mask] == tokens
        fits &= columns.written[places] >= claimed
        if np.count_nonzero(is_ahead) < len(places):
            fits = np.where(is_ahead, fits, self._may_feed(tokens))
        fits &= columns.request[places] == NOBODY
        fits &= claimed < columns.bound[places]
        fits &= ~(columns.is_staged[places] | columns.loops[places])
        if np.count_nonzero(fits) < len(places):
            places, tokens, requests, claimed = places[fits], tokens[fits], requests[fits], claimed[fits]
            is_ahead = is_ahead[fits]
        columns.request[places] = requests
        self.hits += int(np.count_nonzero(is_ahead))
        columns.tokens[places, claimed & self._mask] = tokens
        columns.claimed[places] = claimed + 1
        columns.goal[places] = np.minimum(claimed + 1 + self._depth, columns.bound[places])
        columns.is_step[places] = are_steps
        columns.turn[places] = next(self._turns)
        columns.arrival[places] = next(self._ages)
        return fits

    def claim_computed(self, place: int, token: int) -> tuple[int, int] | None:
        """`claim` for one step that was computed ahead and leaves more ahead: the token drawn, and the rows there are.

        Where nothing is left ahead, the next row has to be begun before the program goes on: `claim` leads to that.
        """
        columns = self.columns
        claimed = int(columns.claimed[place])
        if (
            columns.written[place] <= claimed
            or columns.submitted[place] <= claimed + 1
            or columns.tokens[place, claimed & self._mask] != token
            or columns.request[place] != NOBODY
            or columns.loops[place]
            or columns.is_staged[place]
        ):
            return None
        self.hits += 1
        columns.claimed[place] = claimed + 1
        columns.goal[place] = min(claimed + 1 + self._depth, int(columns.bound[place]))
        columns.turn[place] = next(self._turns)
        columns.arrival[place] = next(self._ages)
        return int(columns.tokens[place, (claimed + 1) & self._mask]), claimed + 1

    def _may_feed(self, tokens: Int64) -> Bool:
        return (tokens >= 0) & (tokens < self._can.vocab_size)

    def answered(self, places: Int64) -> Drawn:
        """Those of the claimed places whose row is computed; they are free for the next request."""
        columns = self.columns
        claimed = columns.claimed[places]
        done = columns.written[places] >= claimed
        if np.count_nonzero(done) < len(places):
            places, claimed = places[done], claimed[done]
        return Drawn(places, columns.tokens[places, claimed & self._mask], claimed)

    def held_back(self, places: Int64) -> int:
        """How many of them have no further row that may be computed before they are asked for it."""
        columns = self.columns
        return int(np.count_nonzero(columns.submitted[places] >= columns.goal[places]))

    def draws_alike(self, place: int, settings: Settings, stream: int) -> bool:
        """Whether a sampler is that of the context's last pass."""
        running = self._passes[place]
        assert running is not None
        assert running.samples is not None
        return running.samples.settings[0] == settings and running.samples.streams[0] == stream

    def place_of(self, request: RequestId) -> int:
        """Where the request is served; -1: not here."""
        found = np.flatnonzero(self.columns.request[: len(self._contexts)] == request)
        return int(found[0]) if len(found) else -1

    # ---- leaving

    def leave(self, context: Context) -> None:
        """The context is what it would be without cohort; what ran ahead is forgotten."""
        place = context.seat
        if place < 0:
            return
        columns = self.columns
        running, claimed = self._passes[place], int(columns.claimed[place])
        assert running is not None
        self._flush(place)
        self.drops += max(int(columns.submitted[place]) - claimed, 0)
        staged, request = bool(columns.is_staged[place]), int(columns.request[place])
        is_step = bool(columns.is_step[place]) and not columns.loops[place]
        written, used = int(columns.written[place]), self.last_used(context)
        self._vacate(context)
        if staged:
            context.submitted = claimed
            context.pages.drop_latest(0, claimed)
            return
        context.written = context.submitted = min(written, claimed)
        context.pages.drop_latest(0, context.submitted)
        context.last_used = used
        self._prefixes.written(context, turn_ended=False)
        if request != NOBODY:
            asked_at = float(columns.asked_at[place]) if is_step else None
            self.resume(self._resumed(running, RequestId(request), place, claimed), asked_at)

    def _vacate(self, context: Context) -> None:
        place, columns = context.seat, self.columns
        columns.stamp[place] += 1
        columns.submitted[place] = columns.goal[place] = 0
        columns.request[place] = NOBODY
        context.seat = -1
        del self._seats[context.id]
        self._contexts[place] = self._held[place] = self._passes[place] = None
        self._free.append(place)

    def _resumed(self, running: Pass, request: RequestId, place: int, claimed: int) -> Pass:
        samples, generation = running.samples, running.generation
        assert samples is not None
        if generation is not None:
            generation.generated = claimed - generation.start
            samples.rows[0], running.drawn = claimed - 1, None
            return running
        return Pass(
            request=request,
            context=running.context,
            base=claimed - 1,
            arrival=int(self.columns.arrival[place]),
            samples=SampleRows([claimed - 1], [0], samples.settings, samples.streams, [0]),
            predictable=True,
            priority=int(self.columns.priority[place]),
        )

    def leave_idle(self) -> bool:
        """Contexts that nobody waits for leave; whether anything had run ahead of them."""
        before = self.drops
        for context in [each for each in self._contexts if each is not None and not each.busy]:
            self.leave(context)
        return self.drops > before

    def last_used(self, context: Context) -> int:
        """A context that is stepped here is used without hearing of it."""
        place = context.seat
        return max(context.last_used, int(self.columns.used[place])) if place >= 0 else context.last_used

    def flush(self, context: Context) -> None:
        """Its history and counts are up to date, and it stays."""
        place = context.seat
        if place >= 0 and not self.columns.is_staged[place]:
            self._flush(place)
            context.written = min(int(self.columns.written[place]), context.length)

    def runs_ahead(self, context: Context) -> bool:
        place = context.seat
        return place >= 0 and bool(self.columns.submitted[place] > self.columns.claimed[place])

    def _flush(self, place: int) -> None:
        columns, history = self.columns, self.context_at(place).history
        flushed, claimed = int(columns.flushed[place]), int(columns.claimed[place])
        if flushed < claimed:
            ring = np.arange(flushed, claimed) & self._mask
            history.extend_next(columns.tokens[place, ring])
            columns.flushed[place] = claimed


def _ring(options: EngineOptions) -> int:
    """Room for what is not flushed: what runs ahead, and as much again."""
    ahead: int = options.speculation_depth + options.max_in_flight + 2
    return int(max(_RING, 1 << (4 * ahead - 1).bit_length()))


_NOBODY: Int64 = np.empty(0, np.int64)
