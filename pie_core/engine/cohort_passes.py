"""Those who wait for the cohort's rows: programs claim what ran ahead for them, and every step is told to all at once.

What a request alone would go through in `engine.passes` happens here to columns of them. Whatever is not plain takes
the context out of the cohort, and the rest of its pass is `engine.passes`' again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from pie_core.contracts.forward import Bool, Int32, Int64
from pie_core.engine.context import Context
from pie_core.engine.latencies import Latencies
from pie_core.engine.messages import Event, Forward, ForwardDone, Progress, Stepped
from pie_core.engine.passes import Passes
from pie_core.errors import PieError
from pie_core.ids import RequestId
from pie_core.scheduler.admission import sampler_settings
from pie_core.scheduler.cohort import Cohort, Drawn, RowStep
from pie_core.scheduler.columns import NOBODY


class CohortPasses:
    def __init__(
        self,
        cohort: Cohort,
        passes: Passes,
        emit: Callable[[Event], None],
        drew: Callable[[Int32], None],
        wake: Callable[[Context], None],
        endings: Iterator[int],
        latencies: Latencies,
    ) -> None:
        self.awaited = 0  # programs that the latest step answered, of which nothing more may run ahead
        self.unasked = 0  # rows computed for programs that have not asked yet; some of them may have left
        self._cohort = cohort
        self._passes = passes
        self._emit = emit
        self._drew = drew
        self._wake = wake
        self._endings = endings
        self._latencies = latencies

    # ---- programs ask

    def steps(self, seats: Int64, tokens: Int64, requests: Int64, moment: float) -> Sequence[int]:
        """Serves what it can of many steps, one of each context; the places of the others."""
        is_here = seats >= 0
        if np.count_nonzero(is_here) == len(seats):
            served = self._serve(seats, tokens, requests, moment)
        else:
            served = is_here
            served[is_here] = self._serve(seats[is_here], tokens[is_here], requests[is_here], moment)
        others: list[int] = [] if _are_all(served) else np.flatnonzero(~served).tolist()
        return others

    def _serve(self, places: Int64, tokens: Int64, requests: Int64, moment: float) -> Bool:
        """Which of these it has served."""
        served = self._cohort.claim(places, tokens, requests, are_steps=True)
        self._claimed(places if _are_all(served) else places[served], moment)
        return served

    def step_now(self, context: Context, token: int) -> tuple[int, int] | None:
        """The token drawn behind this one and the rows there are, if that is known already and more runs ahead."""
        place = context.seat
        found = self._cohort.claim_computed(place, token) if place >= 0 and not context.waiting else None
        if found is not None:
            self.unasked -= 1
            self._drew(self._cohort.columns.process[place : place + 1])
            self._cohort.columns.used[place] = next(self._endings)
        return found

    def claim(self, context: Context, command: Forward, moment: float) -> bool:
        """Whether the pass is the next row of a context in the cohort. One that is not takes it out of there."""
        place = context.seat
        if place < 0:
            return False
        if (
            self._is_plain(place, command)
            and self._cohort.claim(
                np.array([place]), np.array(command.tokens), np.array([command.request]), are_steps=False
            ).all()
        ):
            own = context.priority if command.priority is None else command.priority
            self._cohort.columns.priority[place] = own
            self._claimed(np.array([place]), moment)
            return True
        self._cohort.misses += self._cohort.runs_ahead(context)
        self._cohort.leave(context)
        return False

    def _is_plain(self, place: int, command: Forward) -> bool:
        columns = self._cohort.columns
        if len(command.tokens) != 1 or len(command.samples) != 1 or command.masks or command.probes:
            return False
        sample = command.samples[0]
        if sample.row or command.num_drafts or command.logit_mask is not None or not command.pass_speculation:
            return False
        position = int(columns.claimed[place] + columns.shift[place])
        if command.positions is not None and command.positions != (position,):
            return False
        spec, context = sample.sampler, self._cohort.context_at(place)
        if spec.bias_tokens or spec.bias_values:
            return False
        stream = context.stream if spec.seed is None else spec.seed
        return self._cohort.draws_alike(place, sampler_settings(spec), stream)

    def _claimed(self, places: Int64, moment: float) -> None:
        columns = self._cohort.columns
        columns.asked_at[places] = moment
        self._drew(columns.process[places])
        done = self._cohort.answered(places)
        self.unasked = max(self.unasked - len(done.places), 0)
        if len(done.places):
            self._answer(done)
        if len(done.places) < len(places):
            for context in self._cohort.contexts_at(places[columns.request[places] != NOBODY]):
                context.busy = True

    def overdue(self, now: float, limit_s: float) -> list[RequestId]:
        """Steps that have waited too long."""
        late = self._waiting_steps(self._cohort.columns.asked_at + limit_s <= now)
        return [RequestId(each) for each in self._cohort.columns.request[late].tolist()]

    def oldest(self) -> float | None:
        """When the step that has waited longest was asked for."""
        waiting = self._waiting_steps(np.True_)
        return float(self._cohort.columns.asked_at[waiting].min()) if waiting.any() else None

    def _waiting_steps(self, among: Bool | np.bool_) -> Bool:
        columns = self._cohort.columns
        found: Bool = (columns.request != NOBODY) & columns.is_step & ~columns.loops & among
        return found

    # ---- steps answer

    def hear(self, drawn: Drawn) -> None:
        """A step gave these tokens."""
        loops = self._cohort.columns.loops[drawn.places]
        looping = np.count_nonzero(loops)
        if looping == len(loops):
            self._hear_generations(drawn)
        elif looping:
            self._hear_generations(drawn.of(loops))
            self._hear_programs(drawn.of(~loops))
        else:
            self._hear_programs(drawn)

    def _hear_generations(self, drawn: Drawn) -> None:
        if not len(drawn.places):
            return
        columns, places = self._cohort.columns, drawn.places
        stopped, full = self._cohort.extend(drawn)
        ended = stopped | full
        going_on = places[~stopped] if np.count_nonzero(stopped) else places
        self._drew(columns.process[going_on])
        told = columns.is_told[places] & ~ended
        if np.count_nonzero(told):
            self._emit(Progress(*self._lists(drawn if _are_all(told) else drawn.of(told), 1)))
        if np.count_nonzero(ended):
            for at in np.flatnonzero(ended).tolist():
                self._end_generation(int(places[at]), is_stopped=bool(stopped[at]))

    def _end_generation(self, place: int, *, is_stopped: bool) -> None:
        request = RequestId(int(self._cohort.columns.request[place]))
        self._cohort.leave(self._cohort.context_at(place))
        self._passes.end_generation(request, is_stopped=is_stopped)

    def _hear_programs(self, drawn: Drawn) -> None:
        waiting = self._cohort.columns.request[drawn.places] != NOBODY
        places = drawn.places if _are_all(waiting) else drawn.places[waiting]
        done = self._cohort.answered(places)
        self.unasked += len(waiting) - len(done.places)
        self.awaited += self._cohort.held_back(done.places)
        if len(done.places):
            self._latencies.answered(self._cohort.columns.asked_at, done.places)
            self._answer(done)

    def _answer(self, done: Drawn) -> None:
        columns, places = self._cohort.columns, done.places
        steps = columns.is_step[places]
        if _are_all(steps):
            self._emit(Stepped(*self._lists(done, 0)))
        else:
            if np.count_nonzero(steps):
                self._emit(Stepped(*self._lists(done.of(steps), 0)))
            for request, token, length, position in zip(*self._lists(done.of(~steps), 0), strict=True):
                self._emit(ForwardDone(request, [token], [], length, position))
        columns.request[places] = NOBODY
        columns.used[places] = next(self._endings)
        for context in self._cohort.contexts_at(places):
            context.busy = False
            if context.waiting:
                self._wake(context)

    def _lists(self, drawn: Drawn, fresh: int) -> tuple[list[RequestId], list[int], list[int], list[int]]:
        """Columns of an event: the contexts have `fresh` rows more than are written."""
        columns, places = self._cohort.columns, drawn.places
        lengths = drawn.written + fresh
        positions = lengths + columns.shift[places]
        requests: list[RequestId] = columns.request[places].tolist()
        return requests, drawn.tokens.tolist(), lengths.tolist(), positions.tolist()

    def fail_rows(self, step: RowStep, causes: Mapping[int, PieError]) -> None:
        """A row that nobody has asked for is forgotten: should its pass really come, it will fail by itself."""
        columns = self._cohort.columns
        for at, cause in causes.items():
            place, row = int(step.places[at]), int(step.rows[at])
            if columns.stamp[place] != step.stamps[at]:
                continue
            request = RequestId(int(columns.request[place]))
            is_asked = (
                request != NOBODY and row == columns.written[place] and self._cohort.is_asked(place, row)
            )
            self._cohort.leave(self._cohort.context_at(place))
            if is_asked:
                self._passes.end_request(request, cause)


def _are_all(flags: Bool) -> bool:
    """As `all`, in a fifth of its time for few flags."""
    return bool(np.count_nonzero(flags) == len(flags))
