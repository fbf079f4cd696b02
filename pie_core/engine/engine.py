"""The engine of one model: takes commands, runs steps, and answers every request exactly once.

It waits for nothing and owns no thread. Whoever drives it (`engine.local_port`, tests, a simulation) hands it commands,
starts steps, collects them from the driver, brings back their outcomes, and passes on the events.

What a command may assume: those of one context take effect in the order they were sent, each after the one before has
ended. When one fails, those already queued behind it on that context fail with it. A snapshot exists once its save is
acknowledged.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from msgspec import structs

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ForwardResult
from pie_core.engine.cohort_passes import CohortPasses
from pie_core.engine.context import Context
from pie_core.engine.contexts import Contexts, no_context
from pie_core.engine.deadlines import Deadlines
from pie_core.engine.latencies import Latencies
from pie_core.engine.messages import (
    Ack,
    Answer,
    BreakOff,
    Cancel,
    Command,
    CreateContext,
    DeleteSnapshot,
    DropContext,
    EndManaging,
    EndProcess,
    Event,
    EvictRows,
    Failed,
    ForkContext,
    Forward,
    ForwardDone,
    Generate,
    Generated,
    ListSnapshots,
    ManagePages,
    ModelInfo,
    OpenSnapshot,
    PageCounts,
    PinRows,
    Progress,
    ReadStatus,
    ReadTokens,
    Sample,
    SaveSnapshot,
    SetPriority,
    SnapshotNames,
    Status,
    Step,
    Stepped,
    Steps,
    TruncateContext,
)
from pie_core.engine.options import EngineOptions
from pie_core.engine.passes import Passes, by_age, oldest
from pie_core.engine.quotas import Quotas
from pie_core.engine.snapshots import Snapshots
from pie_core.engine.suspensions import Suspensions
from pie_core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    OutOfPages,
    PieError,
)
from pie_core.ids import ContextId, RequestId, Ticket
from pie_core.kv_pages.context_pages import Cache
from pie_core.kv_pages.prefix_cache import PrefixCache
from pie_core.kv_pages.raw_pages import RawPages
from pie_core.scheduler.admission import Admission
from pie_core.scheduler.cohort import Cohort
from pie_core.scheduler.intake import Intake, Perform, request_of
from pie_core.scheduler.loop import Loop
from pie_core.scheduler.prefixes import Prefixes
from pie_core.scheduler.request import Pass
from pie_core.scheduler.run_ahead import RunAhead


class Engine:
    """Not thread-safe, but for `collect` of its driver, which a second thread may call."""

    def __init__(
        self,
        driver: Driver,
        options: EngineOptions,
        model_name: str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.driver = driver
        self.options = options
        self.info = _model_info(driver, model_name)
        self._clock = clock
        self._events: list[Event] = []
        self._stepping: set[RequestId] = set()  # open Steps
        self._cache = Cache(driver.capabilities.cache, options.swap_bytes)
        self._suspensions = Suspensions(driver, self._cache, options)
        self._snapshots = Snapshots(self._cache, options, driver.capabilities.weights_revision, wall_clock)
        self._quotas = Quotas(options, self._cache, clock)
        self._contexts = Contexts(self._cache, self._snapshots, self._quotas, self._emit)
        self._admission = admission = Admission(driver.capabilities, options)
        self._ahead = RunAhead(driver.capabilities, options)
        self._latencies = Latencies(clock)
        can = driver.capabilities
        identity = (can.architecture, can.weights_revision, can.kv_dtype)
        self._prefix_cache = PrefixCache(
            self._cache, identity, enabled=options.prefix_cache, states_every=options.checkpoint_tokens
        )
        self._prefixes = Prefixes(self._prefix_cache)
        self._prefixes.fetch, self._suspensions.swapped_out = (
            self._suspensions.fetch,
            self._prefixes.swapped_out,
        )
        arrivals, endings, tokens = itertools.count(), itertools.count(1), self._quotas.tokens
        self._cohort = Cohort(can, options, self._cache, self._prefixes, tokens.number, arrivals)
        self._passes = Passes(
            admission,
            self._ahead,
            self._cohort,
            self._emit,
            self._pass_ended,
            self._latencies,
            self._quotas.count_generated,
            arrivals,
            endings,
        )
        self._intake = Intake(self._in_turn(), self._emit, self._discarded)
        self._cohort_passes = CohortPasses(
            self._cohort,
            self._passes,
            self._emit,
            tokens.add_each,
            self._intake.wake,
            endings,
            self._latencies,
        )
        self._cohort.resume = self._resume
        self._passes.loop = self._loop = Loop(
            driver,
            options,
            self._cache,
            self._suspensions,
            self._prefixes,
            self._ahead,
            self._cohort,
            self._passes.settle,
            self._cohort_passes,
        )
        self._at_once = self._on_arrival()
        self._schedule_s = self._deliver_s = 0.0
        self._deadlines = Deadlines()
        self._timeouts = 0
        # Whether the last step ended passes of programs that step themselves, and nothing more may run ahead of them:
        # their next ones belong in the next step.
        self.awaits_programs = False

    def handle(self, commands: Iterable[Command]) -> None:
        """Takes commands in the order they were sent."""
        for command in commands:
            try:
                self._at_once.get(type(command), self._queue)(command)
            except PieError as error:
                self._refuse(command, error)
        self._intake.advance()

    def step_now(self, id_: ContextId, token: int) -> tuple[int, int] | None:
        """A step of a context that waits for nothing else: the token it draws and the rows there are, if known already.

        None: `handle` it like any other.
        """
        if not self._cohort_passes.unasked or self._quotas.may_refuse:
            return None
        context = self._contexts.get(id_)
        return None if context is None else self._cohort_passes.step_now(context, token)

    def start_step(self) -> Ticket | None:
        """Submits a step to the driver: collect the ticket and bring the outcome to `finish_step`."""
        begun_at = time.perf_counter()
        ticket = self._start_step()
        self._schedule_s += time.perf_counter() - begun_at
        return ticket

    def _start_step(self) -> Ticket | None:
        self._end_overdue()
        self._suspensions.begin_step()
        while True:
            ticket = self._loop.start()
            begun = self._intake.advance()
            if ticket is not None:
                self._make_way(len(self._loop.in_flight[ticket]))
                return ticket
            if not begun and not (self._is_stalled and self._relieve()):
                return None

    def finish_step(self, ticket: Ticket, outcome: ForwardResult | Exception) -> None:
        """What `driver.collect` of a started ticket gave or raised."""
        begun_at = time.perf_counter()
        chunks = self._loop.in_flight[ticket].chunks
        self._cohort_passes.awaited = 0
        self._loop.finish(ticket, outcome)
        self._suspensions.observe(self._loop.tokens, self._loop.busy_s)
        self._intake.advance()
        self.awaits_programs = self._cohort_passes.awaited > 0 or any(
            each.running.request is not None
            and each.running.generation is None
            and each.running not in self._loop.waiting
            for each in chunks
        )
        self._deliver_s += time.perf_counter() - begun_at

    def _emit(self, event: Event) -> None:
        if isinstance(event, Stepped | Progress):
            self._events.append(event)
            return
        self._events.append(self._in_kind(event))
        if not isinstance(event, Generated) or event.finish is not None:
            self._quotas.end_request(event.request)

    def _in_kind(self, event: Answer) -> Event:
        """A step is answered by Stepped."""
        if event.request not in self._stepping or not isinstance(event, Failed | ForwardDone):
            return event
        self._stepping.remove(event.request)
        if isinstance(event, Failed):
            return event
        return Stepped([event.request], event.tokens, [event.length], [event.position])

    def take_events(self) -> list[Event]:
        """What happened since the last call."""
        events = self._events.copy()
        self._events.clear()
        return events

    def context(self, id_: ContextId) -> Context | None:
        return self._contexts.get(id_)

    def runs_ahead(self, id_: ContextId) -> bool:
        """Whether something is computed for the context that nobody has asked for yet."""
        context = self._contexts.get(id_)
        return context is not None and (context.ahead > 0 or self._cohort.runs_ahead(context))

    @property
    def wakes_in_s(self) -> float | None:
        """After how long `start_step` is to be called though nothing has happened; None: never."""
        moment, oldest, limit_s = self._deadlines.next, None, self.options.request_timeout_s
        if limit_s is not None and (oldest := self._cohort_passes.oldest()) is not None:
            moment = min(oldest + limit_s, oldest + limit_s if moment is None else moment)
        return None if moment is None else max(moment - self._clock(), 0.0)

    # ---- which command does what

    def _on_arrival(self) -> dict[type, Callable[..., None]]:
        return {
            CreateContext: self._contexts.create,
            OpenSnapshot: self._contexts.open,
            ForkContext: self._announce_fork,
            DeleteSnapshot: self._delete_snapshot,
            ListSnapshots: self._list_snapshots,
            EndProcess: self._end_process,
            Steps: self._steps,
            BreakOff: self._break_off,
            Cancel: self._cancel,
            ReadStatus: self._read_status,
        }

    def _in_turn(self) -> dict[type, Perform]:
        return {
            ForkContext: self._without_guesses(self._fork),
            TruncateContext: self._without_guesses(self._truncate),
            EvictRows: self._without_guesses(self._evict),
            PinRows: self._without_guesses(self._pin),
            SetPriority: self._without_guesses(self._set_priority),
            ManagePages: self._without_guesses(self._manage_pages),
            EndManaging: self._without_guesses(self._end_managing),
            DropContext: self._without_guesses(self._drop),
            Forward: self._forward,
            Step: self._step,
            Generate: self._generate,
            BreakOff: self._without_guesses(self._passes.break_off_ended),
            SaveSnapshot: self._without_guesses(self._contexts.save),
            ReadTokens: self._read_tokens,
        }

    def _without_guesses(self, perform: Perform) -> Perform:
        """Nothing but a pass may see what runs ahead."""

        def dropped(context: Context, command: Command) -> None:
            self._passes.drop_ahead(context)
            perform(context, command)

        return dropped

    def _queue(
        self,
        command: Forward
        | Generate
        | Step
        | TruncateContext
        | EvictRows
        | PinRows
        | SetPriority
        | ManagePages
        | EndManaging
        | DropContext
        | SaveSnapshot
        | ReadTokens,
    ) -> None:
        context = self._contexts.get(command.context)
        if context is None:
            raise no_context(command.context)
        if isinstance(command, Forward | Generate | Step):
            if self._quotas.counts_requests:
                self._cohort.flush(context)
            self._quotas.add_request(command, context, self._contexts)
            self._set_deadline(command)
        if isinstance(command, Step):
            self._stepping.add(command.request)
        self._intake.add(context, command)

    def _resume(self, running: Pass, asked_at: float | None) -> None:
        """A pass left the cohort; a Step is known from now on like one that was never there."""
        limit_s = self.options.request_timeout_s
        assert running.request is not None
        if asked_at is not None:
            self._stepping.add(running.request)
            if limit_s is not None:
                self._deadlines.set(running.request, asked_at + limit_s)
        self._passes.resume(running)

    def _set_deadline(self, command: Forward | Generate | Step) -> None:
        own = None if isinstance(command, Step) else command.timeout_s
        timeout_s = own if own is not None else self.options.request_timeout_s
        if timeout_s is not None:
            self._deadlines.set(command.request, self._clock() + timeout_s)

    def _end_overdue(self) -> None:
        for request in self._overdue():
            self._timeouts += 1
            self._end_request(
                request, DeadlineExceeded("the request took longer than it may, waiting included")
            )

    def _overdue(self) -> list[RequestId]:
        expired, limit_s = self._deadlines.expired(self._clock()), self.options.request_timeout_s
        return expired if limit_s is None else expired + self._cohort_passes.overdue(self._clock(), limit_s)

    def _refuse(self, command: Command, error: PieError) -> None:
        """A command was refused on arrival; one that cannot fail by itself spoils the next request on its context."""
        request = request_of(command)
        context = (
            self._contexts.get(command.context) if isinstance(command, CreateContext | ForkContext) else None
        )
        if request is not None:
            self._emit(Failed(request=request, code=error.code, message=str(error)))
        elif context is not None:
            self._cohort.leave(context)
            context.fault = error

    # ---- on arrival

    def _steps(self, command: Steps) -> None:
        """Most are the next rows of contexts in the cohort; the others are passes like any other."""
        self._intake.advance()  # what was sent before them comes before them
        for place in self._others(command):
            step = Step(command.requests[place], command.contexts[place], command.tokens[place])
            try:
                self._queue(step)
            except PieError as error:
                self._refuse(step, error)

    def _others(self, command: Steps) -> Sequence[int]:
        """The places of those steps that the cohort does not serve."""
        count = len(command.contexts)
        if len(set(command.contexts)) < count:
            return range(count)
        seats = self._cohort.seats(command.contexts)
        if self._quotas.may_refuse and self._quotas.refuses_some(
            self._cohort.columns.process[seats[seats >= 0]]
        ):
            return range(count)
        requests, tokens = np.array(command.requests, np.int64), np.array(command.tokens, np.int64)
        return self._cohort_passes.steps(seats, tokens, requests, self._clock())

    def _announce_fork(self, command: ForkContext) -> None:
        self._intake.add(self._contexts.announce_fork(command), command)

    def _delete_snapshot(self, command: DeleteSnapshot) -> None:
        self._snapshots.delete(command.tenant, command.name, command.saved_before)
        self._emit(Ack(request=command.request))

    def _list_snapshots(self, command: ListSnapshots) -> None:
        saved = self._snapshots.saved(command.tenant)
        self._emit(SnapshotNames(command.request, list(saved), list(saved.values())))

    def _end_process(self, command: EndProcess) -> None:
        error = Cancelled(f"process {command.process} has ended")
        for context in [each for each in self._contexts if each.process == command.process]:
            self._intake.fail_all(context, error)
            self._passes.drop_ahead(context)
            self._forget(context)
            running = self._passes.of(context)
            if running is not None:
                self._passes.end(running, error)
            self._passes.forget_generation(context)
        self._quotas.forget_process(command.process)

    def _break_off(self, command: BreakOff) -> None:
        generation = command.generation
        ended = self._passes.context_of_generation(generation)
        if self._passes.get(generation) is not None or generation in self._intake.queued:
            self._passes.break_off(command)
        elif ended is not None:
            self._intake.add(ended, command)
        else:
            raise NotFound(f"no generation {generation} to break off: it failed, or its context has moved on")

    def _cancel(self, command: Cancel) -> None:
        self._end_request(command.target, Cancelled("the request was cancelled"))

    def _end_request(self, request: RequestId, error: PieError) -> None:
        running = self._passes.get(request)
        if running is not None:
            self._passes.end(running, error)
        elif request in self._intake.queued:
            self._intake.cancel(request, error)

    def _read_status(self, command: ReadStatus) -> None:
        status = Status(
            request=command.request,
            contexts=len(self._contexts),
            waiting=len(self._loop.waiting) + len(self._intake.queued),
            running=sum(map(len, self._loop.in_flight.values())),
            shared_rows=self._loop.shared_rows,
            cohort_rows=self._cohort.rows,
            free_pages=[
                pool.num_free + idle
                for pool, idle in zip(self._cache.pools, self._prefix_cache.idle_pages(), strict=True)
            ],
            total_pages=[pool.num_pages for pool in self._cache.pools],
            steps=self._loop.steps,
            tokens=self._loop.tokens,
            busy_s=self._loop.busy_s,
            passes=self._loop.passes,
            schedule_s=self._schedule_s,
            deliver_s=self._deliver_s,
            run_ahead_hits=self._ahead.hits + self._cohort.hits,
            run_ahead_misses=self._ahead.misses + self._cohort.misses,
            run_ahead_drops=self._ahead.drops + self._cohort.drops,
            cached_pages=self._prefix_cache.idle_pages(),
            prefix_hit_tokens=self._prefixes.hit_tokens,
            suspensions=self._suspensions.swaps + self._suspensions.replays,
            replayed_tokens=self._suspensions.replayed_tokens,
            swapping=self._suspensions.use(self._contexts),
            groups=[pool.name for pool in self._cache.pools],
            sampled_tokens=self._loop.sampled_tokens,
            prefix_lookup_tokens=self._prefixes.lookup_tokens,
            failed_passes=self._loop.failed_passes,
            timeouts=self._timeouts,
            batch_sizes=self._loop.batch_sizes.distribution(),
            step_seconds=self._loop.step_seconds.distribution(),
            first_token_seconds=self._latencies.first_token.distribution(),
            between_tokens_seconds=self._latencies.between_tokens.distribution(),
            pass_wait_seconds=self._latencies.pass_wait.distribution(),
            processes=self._quotas.uses(self._contexts) if command.processes else [],
        )
        self._emit(status)

    # ---- in a context's turn

    def _generate(self, context: Context, command: Generate) -> None:
        left = self._quotas.tokens_left(context.process)
        if left == 0:
            raise LimitExceeded(
                f"process {context.process!r} has fed and drawn all tokens that it may"
                f" ({self.options.max_tokens_per_process}, limits.tokens_per_program of the model)"
            )
        if left is not None:
            command = structs.replace(command, max_tokens=min(command.max_tokens or left, left))
        self._passes.generate(context, command)

    def _forward(self, context: Context, command: Forward) -> None:
        if not self._cohort_passes.claim(context, command, self._clock()):
            self._passes.forward(context, command)

    def _step(self, context: Context, command: Step) -> None:
        if context.sampler is None:
            raise InvalidRequest(
                "nothing to repeat: the context's last pass was not one sampler on its last row"
            )
        samples = (Sample(0, context.sampler),)
        self._forward(context, Forward(command.request, command.context, (command.token,), samples=samples))

    def _read_tokens(self, context: Context, command: ReadTokens) -> None:
        self._cohort.flush(context)
        self._contexts.read_tokens(context, command)

    def _fork(self, source: Context, command: ForkContext) -> None:
        child = self._contexts.fork(source, command)
        if child is not None:
            self._intake.wake(child)

    def _discarded(self, command: Command, error: PieError) -> None:
        """What else hangs on a command that was not carried out."""
        if isinstance(command, Generate):
            self._passes.answer_break(command.request, error)
        elif isinstance(command, ForkContext):
            child = self._contexts.lose_child(command, error)
            if child is not None:
                self._intake.wake(child)

    def _truncate(self, context: Context, command: TruncateContext) -> None:
        self._contexts.truncate(context, command)
        self._passes.forget_generation(context)

    def _evict(self, context: Context, command: EvictRows) -> None:
        self._admission.evict(command, context)
        context.evict(command.start, command.stop)
        self._passes.forget_generation(context)

    def _pin(self, context: Context, command: PinRows) -> None:
        self._admission.evict(command, context)
        context.evictions.pin(command.start, command.stop)

    def _set_priority(self, context: Context, command: SetPriority) -> None:
        context.priority = command.priority

    def _manage_pages(self, context: Context, command: ManagePages) -> None:
        """Checks all of it before anything changes."""
        raw = context.raw or self._admission.raw_pages(self._cache, context)
        raw.check_commit(command.commit, context.written)
        raw.check_release(command.release, context.length)
        self._passes.forget_generation(context)
        if command.reserve:
            self._check_reserve(context, raw, command.reserve)
        context.raw = raw
        raw.committed += command.commit
        raw.count += command.reserve - command.release
        raw.renew(context.pages)
        self._prefixes.committed(context)
        counts = (raw.committed, raw.count, context.length)
        self._emit(PageCounts(command.request, *counts))

    def _check_reserve(self, context: Context, raw: RawPages, count: int) -> None:
        """Raises OutOfPages, LimitExceeded or InvalidRequest; idle contexts may have given way."""
        rows = raw.rows + count * raw.page_size
        self._admission.check_reserve(rows - raw.page_size + 1, context)
        self._quotas.refuse_too_many_pages(context, rows - context.length, self._contexts)
        raw.withdraw()
        try:
            while not raw.can_reserve(count, context.pages):
                self._make_room(context, count)
        finally:
            if context.raw is raw:  # otherwise it is refused, or its promises begin once it counts
                raw.renew(context.pages)

    def _make_room(self, context: Context, count: int) -> None:
        if not (self._suspend_idle(but=context) or self._snapshots.suspend_one(self._suspensions.suspend)):
            raise OutOfPages(
                f"no room for {count} more pages now (free: {self._free_pages()}): reserve fewer, release or "
                "truncate what is not needed, or try again when other programs have ended"
            )

    def _end_managing(self, context: Context, command: EndManaging) -> None:
        context.manage_by_itself()

    def _drop(self, context: Context, command: DropContext) -> None:
        self._intake.fail_all(context, no_context(context.id))
        self._passes.forget_generation(context)
        self._forget(context)

    def _forget(self, context: Context) -> None:
        if not context.busy:
            self._prefixes.turn_ended(context)
        self._contexts.forget(context)

    def _pass_ended(self, context: Context, error: PieError | None) -> None:
        if context.dropped:
            if not context.busy:
                context.pages.release()
        elif error is not None:
            self._intake.fail_behind(context, error)
        else:
            if context.last_generation is not None:
                self._prefixes.turn_ended(context)
            self._intake.wake(context)

    # ---- when memory is full

    @property
    def _is_stalled(self) -> bool:
        return self._loop.stalled and bool(self._loop.waiting)

    def _relieve(self) -> bool:
        """Frees what is worth least, or fails the youngest pass if nothing can be freed; False: nothing waits."""
        return (
            self._cohort.leave_idle()
            or self._ahead.drop_idle()
            or self._drop_checkpoints()
            or self._suspend_idle()
            or self._snapshots.suspend_one(self._suspensions.suspend)
            or self._break_promises()
            or self._suspend_youngest()
            or self._suspensions.let_back()
            or self._fail_youngest()
        )

    def _make_way(self, chosen: int) -> None:
        """Passes that lack pages need not wait until nothing runs: idle contexts give theirs up to the oldest of them,
        and where there are none, so do the youngest of those that lack pages."""
        if not self._loop.waiting:
            return
        waiting = [each for each in self._loop.waiting if not each.in_flight]
        first = oldest(waiting, _SERVED_AT_ONCE)
        wanted = self._cache.first_that_take_little(each.wanted_pages for each in first)
        while not self._cache.will_have(wanted):
            if not self._suspend_idle():
                self._make_youngest_give_way(by_age(each for each in waiting if each.holds_pages), chosen)
                return

    def _make_youngest_give_way(self, holding: list[Pass], chosen: int) -> None:
        """As many as it takes for the others to go on: while they stand still, their pages are of no use to anybody.
        Rows are given up to be computed again only where more stand still than the step took in."""
        wanted = [each.wanted_pages for each in holding]
        sums = self._cache.sum_of(wanted)
        while len(holding) > 1 and not self._cache.will_have(sums):
            if len(holding) <= chosen and not self._suspensions.would_swap(holding[-1].context):
                return
            self._suspend(holding.pop().context)
            sums = [total - own for total, own in zip(sums, wanted.pop(), strict=True)]

    def _suspend_idle(self, but: Context | None = None) -> bool:
        """Of the lowest priority whoever has not asked for anything for longest."""
        idle = [
            each for each in self._contexts if not each.busy and not each.pages.is_empty and each is not but
        ]
        for each in idle:
            each.last_used = self._cohort.last_used(each)
        if idle:
            self._suspend(self._suspensions.cheapest(idle))
        return bool(idle)

    def _break_promises(self) -> bool:
        """Pages that are reserved and hold nothing go to those that wait; whether there were any."""
        promised = [each.raw for each in self._contexts if each.raw is not None and each.raw.is_promised]
        for raw in promised:
            raw.withdraw()
        return bool(promised)

    def _suspend_youngest(self) -> bool:
        """Passes that wait give way to older ones, so that the oldest goes on until it ends."""
        younger = [
            each.context for each in self._passes.waiting_by_age()[1:] if not each.context.pages.is_empty
        ]
        if younger:
            self._suspend(younger[-1])
        return bool(younger)

    def _suspend(self, context: Context) -> None:
        self._passes.drop_ahead(context)
        self._suspensions.suspend(context)
        if context.raw is not None:
            context.raw.withdraw()

    def _fail_youngest(self) -> bool:
        self._passes.end(
            self._passes.waiting_by_age()[-1],
            OutOfPages(
                f"no KV pages for this request (free: {self._free_pages()}), though nothing else has any; "
                "shorten the context, evict rows of it, or give the model more KV memory"
            ),
        )
        return True

    def _free_pages(self) -> str:
        return ", ".join(f"{pool.name} {pool.num_free} of {pool.num_pages}" for pool in self._cache.pools)

    def _drop_checkpoints(self) -> bool:
        """Recurrent models: states of one context kept for going back are worth less than going on."""
        return any(each.pages.drop_checkpoints() for each in self._contexts)


_SERVED_AT_ONCE = 32  # passes for which idle contexts are looked at in one step


def _model_info(driver: Driver, model_name: str) -> ModelInfo:
    can = driver.capabilities
    paged = (space.page_size for space in can.cache if space.group.kind in ("paged", "latent"))
    return ModelInfo(
        name=model_name,
        driver=can.driver,
        architecture=can.architecture,
        vocab_size=can.vocab_size,
        max_model_len=can.max_model_len,
        page_size=next(paged, can.cache[0].page_size if can.cache else 1),
        features=can.features,
    )
