"""One history of a simulation: programs that fight over too little memory while everything goes wrong around them.

They generate, step, fork, go back, evict, save and break off; steps fail or take long, requests are cancelled and time
runs out. Everything depends on the seed, the time is virtual, and whatever was drawn is computed again, alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from pie_core.contracts.driver import Driver, DriverDeclaration, DriverRequest
from pie_core.contracts.forward import ForwardResult
from pie_core.engine.engine import Engine
from pie_core.engine.messages import (
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
    ManagePages,
    OpenSnapshot,
    PageCounts,
    ReadStatus,
    Sample,
    SamplerSpec,
    SaveSnapshot,
    SnapshotOpened,
    Status,
    Step,
    Stepped,
    Steps,
    TruncateContext,
    one_by_one,
)
from pie_core.engine.options import EngineOptions
from pie_core.errors import ForwardError
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant, Ticket
from pie_core.testing.simulated_programs import SAMPLERS, Checker, Draw, Program, Shadow, some_prompt

VOCABULARY = 61
MAX_ROWS = 48  # of a context
EVENTS = 200  # of a history, at least
TENANT = Tenant("t")
PRIORITIES = (None, None, None, -1, 1)
GROUPS: tuple[tuple[str, ...], ...] = (
    ("paged",),
    ("paged",),
    ("latent", "window"),
    ("paged", "state"),
    ("state",),
)
EXPECTED_FAILURES = {"cancelled", "deadline-exceeded", "forward"}
COVERAGE = (
    *("events", "oversubscribed_64", "evictions", "suspensions", "prefix_hits"),
    *("pages_swapped_out", "pages_swapped_in", "pages_fetched", "failed_swaps", "replayed_tokens"),
    *("run_ahead_hits", "run_ahead_misses", "run_ahead_drops", "forks_of_staged"),
    *("steps_together", "steps_now", "cohort_rows", "managed_pages"),
    *("crashes", "cancellations", "cancel_storms", "timeouts", "bursts", "slow_steps", "draws_checked"),
)


# Of acting, starting and ending steps, stepping together, interfering, bursts and storms of cancellation.
_HOW_OFTEN = tuple(accumulate((24.0, 6.0, 6.0, 2.0, 1.5, 0.3, 0.1)))

Swap = Callable[[int, Sequence[int], Sequence[int]], None]


class Wrong(AssertionError):
    """A history showed what must never be."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a seed makes of a history's surroundings."""

    groups: tuple[str, ...]
    page_size: int
    num_pages: int
    num_host_pages: int
    failing_swaps: float  # how many of them
    oversubscription: int  # rows that all programs want at most, over rows that there are
    programs: int
    crashes_every: int  # steps; 0 = never
    slow_rate: float
    options: EngineOptions

    @staticmethod
    def of(random: Random) -> Settings:
        page_size = random.choice((1, 2, 4, 8))
        oversubscription = random.choices((1, 2, 4, 8, 16, 32, 64), (40, 40, 40, 40, 15, 4, 1))[0]
        fewest_rows = MAX_ROWS + 2 * page_size  # one context alone must fit
        programs = max(random.randint(8, 12), -(-oversubscription * fewest_rows // MAX_ROWS))
        rows = max(programs * MAX_ROWS // oversubscription, fewest_rows)
        return Settings(
            groups=random.choice(GROUPS),
            page_size=page_size,
            num_pages=-(-rows // page_size),
            num_host_pages=random.choice((0, 0, 4, 1024)),
            failing_swaps=random.choice((0.0, 0.1)),
            oversubscription=oversubscription,
            programs=programs,
            crashes_every=random.choice((0, 0, 7, 23, 50)),
            slow_rate=random.choice((0.0, 0.02)),
            options=_engine_options(random),
        )


def _engine_options(random: Random) -> EngineOptions:
    return EngineOptions(
        max_batch_tokens=random.choice((3, 8, 64, 64)),
        max_batch_requests=random.choice((2, 8, 64, 64)),
        max_in_flight=random.randint(1, 3),
        speculation_depth=random.randint(0, 4),
        checkpoint_tokens=random.choice((4, 16)),
        request_timeout_s=random.choice((None, 30.0)),
    )


def _loaded(declaration: DriverDeclaration, settings: Settings) -> Driver:
    return _load(
        declaration,
        settings,
        page_size=settings.page_size,
        num_pages=settings.num_pages,
        num_host_pages=settings.num_host_pages,
        fail_every=settings.crashes_every,  # a step that fails has written nothing
    )


def _loaded_to_check(
    declaration: DriverDeclaration, settings: Settings, num_pages: int, page_size: int
) -> Driver:
    return _load(declaration, settings, num_pages=num_pages, page_size=page_size, num_host_pages=0)


def _load(declaration: DriverDeclaration, settings: Settings, **sizes: int) -> Driver:
    options = declaration.options(
        vocab_size=VOCABULARY,
        groups=settings.groups,
        window=7,
        max_model_len=4 * MAX_ROWS,
        max_in_flight=3,
        **sizes,
    )
    return declaration.load(DriverRequest(None, "cpu", options, {}, {}))


class History:
    """One run: programs act, steps start and end in an order that the seed decides, time passes when steps end."""

    def __init__(self, seed: int, declaration: DriverDeclaration) -> None:
        self.random = Random(seed)
        self.settings = Settings.of(self.random)
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        settings = self.settings
        self._driver = _loaded(declaration, settings)
        for swap in ("swap_out", "swap_in"):
            setattr(self._driver, swap, self._often(getattr(self._driver, swap)))
        self._checker = Checker(
            lambda pages, page_size: _loaded_to_check(declaration, settings, pages, page_size)
        )
        self._engine = Engine(self._driver, self.settings.options, "simulated", clock=lambda: self.now)
        self._in_flight: deque[Ticket] = deque()
        self._numbers = 0
        self._answers: dict[int, Callable[[Any], None]] = {}
        self._programs: list[Program] = []
        self._snapshots: dict[str, Shadow] = {}
        self._steps: set[RequestId] = set()  # requests for a step
        self._happenings = (
            self._act,
            self._start,
            self._finish,
            self._step_together,
            self._interfere,
            self._burst,
            self._cancel_all,
        )

    def run(self) -> None:
        """Raises Wrong."""
        for _ in range(self.settings.programs):
            self._launch()
        self._happen(0.7 * EVENTS)
        self._drain()
        while self.counts["events"] < EVENTS:
            self._happen(0.1 * EVENTS)
            self._drain()
        self._end()

    def _happen(self, events: float) -> None:
        """So many events at least: somebody asks for something, a step begins or ends."""
        enough = self.counts["events"] + events
        for _ in range(50 * EVENTS):
            self.random.choices(self._happenings, cum_weights=_HOW_OFTEN)[0]()
            if self.counts["events"] >= enough:
                return
        raise Wrong(f"nothing happens any more: {[each for each in self._programs if each.waits_for]}")

    def _often(self, swap: Swap) -> Swap:
        def swap_or_fail(group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
            if self.random.random() < self.settings.failing_swaps:
                raise ForwardError("this swap fails, as the history wants it")
            swap(group, sources, targets)

        return swap_or_fail

    # ---- time and the driver

    def _start(self) -> None:
        ticket = self._engine.start_step()
        if ticket is not None:
            self.counts["events"] += 1
            self._in_flight.append(ticket)
        self._deliver()

    def _finish(self) -> None:
        if not self._in_flight:
            return
        self.counts["events"] += 1
        ticket = self._in_flight.popleft()
        slow = self.random.random() < self.settings.slow_rate
        self.counts["slow_steps"] += slow
        self.now += 20.0 if slow else 0.01
        outcome: ForwardResult | Exception
        try:
            outcome = self._driver.collect(ticket)
        except ForwardError as error:
            self.counts["crashes"] += 1
            outcome = error
        self._engine.finish_step(ticket, outcome)
        self._deliver()

    def _drain(self) -> None:
        """Lets everything end that is under way."""
        for _ in range(20_000):
            self._start()
            if self._in_flight:
                self._finish()
            elif not any(each.waits_for for each in self._programs):
                return
        raise Wrong(f"it goes on for ever: {[each for each in self._programs if each.waits_for]}")

    def _send(self, *commands: Command) -> None:
        self.counts["events"] += bool(commands)
        self._engine.handle(commands)
        self._deliver()

    def _deliver(self) -> None:
        for event in self._engine.take_events():
            self._check_kind(event)
            for answer in one_by_one(event):
                self._answer(answer)

    def _check_kind(self, event: Event) -> None:
        """Steps are answered together, passes one by one."""
        if isinstance(event, ForwardDone) and event.request in self._steps:
            raise Wrong(f"a step was answered like a pass: {event}")
        if isinstance(event, Stepped) and not self._steps.issuperset(event.requests):
            raise Wrong(f"a pass was answered like a step: {event}")

    def _answer(self, event: Answer) -> None:
        is_last = not isinstance(event, Generated) or event.finish is not None
        handler = self._answers.pop(event.request, None) if is_last else self._answers.get(event.request)
        if handler is None:
            raise Wrong(f"answered twice, or never asked: {event}")
        handler(event)

    def _request(self, handler: Callable[[Any], None]) -> RequestId:
        self._numbers += 1
        self._answers[self._numbers] = handler
        return RequestId(self._numbers)

    # ---- programs

    def _launch(self, shadow: Shadow | None = None, context: int | None = None) -> Program:
        self._numbers += 1
        program = Program(f"p{self._numbers}", context or self._numbers, shadow or Shadow(self._numbers))
        program.persistence = self.random.choice((0.0, 0.0, 0.9))
        if context is None:
            self._send(
                CreateContext(
                    ContextId(program.context), ProcessId(program.name), TENANT, seed=program.shadow.stream
                )
            )
        self._programs.append(program)
        return program

    def _act(self) -> None:
        idle = [each for each in self._programs if each.waits_for is None]
        if not idle:
            return
        program = self.random.choice(idle)
        if program.room is not None:
            self._use_room(program, program.room - len(program.shadow.tokens))
        elif len(program.shadow.tokens) > MAX_ROWS - 16:
            self.random.choice((self._replace, self._truncate))(program)
        elif program.last is not None and self.random.random() < program.persistence:
            self._loop(program)
        else:
            others = (
                self._generate,
                self._loop,
                self._fork,
                self._truncate,
                self._evict,
                self._save,
                self._open,
                self._manage,
            )
            self.random.choices(others, (6, 12, 2, 2, 2, 1, 1, 1))[0](program)

    def _burst(self) -> None:
        """Everybody who can asks for something at once."""
        self.counts["bursts"] += 1
        for program in [each for each in self._programs if each.waits_for is None and each.room is None]:
            if len(program.shadow.tokens) <= MAX_ROWS - 16:
                self._generate(program)

    def _cancel_all(self) -> None:
        """A storm: whatever is asked for is cancelled, in one go."""
        waiting = [each.waits_for for each in self._programs if each.waits_for is not None]
        self.counts["cancel_storms"] += bool(waiting)
        self._send(*(Cancel(RequestId(each)) for each in waiting))

    def _interfere(self) -> None:
        """Somebody does not wait for the end of what it asked for."""
        waiting = [each for each in self._programs if each.waits_for is not None]
        if not waiting:
            return
        program = self.random.choice(waiting)
        request = program.waits_for
        assert request is not None
        if program.generates and program.received and self.random.random() < 0.5:
            self._break_off(program, request)
        else:
            self.counts["cancellations"] += 1
            self._send(Cancel(RequestId(request)))

    def _generate(self, program: Program) -> None:
        prompt = self._next_tokens(program)
        sampler, limit = self.random.choice(SAMPLERS), self.random.randint(1, 8)
        program.received, program.generates = [], True

        def hear(event: Generated | Failed) -> None:
            if isinstance(event, Failed):
                self._failed(program, event)
                return
            program.received += event.tokens
            if event.finish is not None:
                program.waits_for = None
                self._note_generated(program, prompt, sampler, event)

        request = self._request(hear)
        program.waits_for = request
        stops = (3, 4) if self.random.random() < 0.3 else ()
        context, priority = ContextId(program.context), self.random.choice(PRIORITIES)
        self._send(Generate(request, context, tuple(prompt), sampler, stops, limit, priority=priority))

    def _note_generated(
        self, program: Program, prompt: list[int], sampler: SamplerSpec, event: Generated
    ) -> None:
        shadow = program.shadow
        shadow.tokens += prompt
        kept = event.length - len(shadow.tokens)
        if not 0 <= kept <= len(program.received):
            raise Wrong(
                f"{program.name} has {event.length} rows after {len(program.received)} tokens: {event}"
            )
        for token in program.received[:kept]:
            shadow.draws.append(Draw(len(shadow.tokens) - 1, sampler, shadow.epoch, token))
            shadow.tokens.append(token)
        program.last = None

    def _break_off(self, program: Program, generation: int) -> None:
        consumed = self.random.randint(0, len(program.received))
        program.generates = False  # once is enough

        def broken(event: Answer) -> None:
            if isinstance(event, Failed) and event.code not in EXPECTED_FAILURES:
                raise Wrong(f"breaking off failed: {event}")

        self._send(BreakOff(self._request(broken), RequestId(generation), consumed))

    def _loop(self, program: Program) -> None:
        """One turn of a loop of the program's own: usually the token drawn last, with the same sampler."""
        if program.last is None or self.random.random() < 0.2:
            self._pass(program, self._next_tokens(program), self.random.choice(SAMPLERS))
        elif self.random.random() < 0.3:
            self._pass(program, [program.last[0]], program.last[1])
        else:
            self._step([program])

    def _pass(self, program: Program, tokens: list[int], sampler: SamplerSpec) -> None:
        request = self._turn(program, tokens, sampler)
        samples = (Sample(len(tokens) - 1, sampler),)
        context, priority = ContextId(program.context), self.random.choice(PRIORITIES)
        self._send(Forward(request, context, tuple(tokens), samples=samples, priority=priority))

    def _step_together(self) -> None:
        """Some whose loops can go on ask for it in one message."""
        able = [each for each in self._programs if each.waits_for is None and each.last is not None]
        able = [each for each in able if each.room is None]
        able = [each for each in able if len(each.shadow.tokens) <= MAX_ROWS - 16]
        if able:
            self._step(self.random.sample(able, self.random.randint(1, len(able))))

    def _step(self, programs: Sequence[Program]) -> None:
        requests, contexts, tokens = [], [], []
        for program in programs:
            assert program.last is not None
            token, sampler = program.last
            if self.random.random() < 0.1:  # a program may feed what it likes
                token = self.random.randrange(VOCABULARY)
            if self._stepped_now(program, token, sampler):
                continue
            requests.append(self._turn(program, [token], sampler))
            contexts.append(ContextId(program.context))
            tokens.append(token)
        self._steps.update(requests)
        self.counts["steps_together"] += len(requests) > 1
        if len(requests) == 1 and self.random.random() < 0.5:
            self._send(Step(requests[0], contexts[0], tokens[0]))
        elif requests:
            self._send(Steps(requests, contexts, tokens))

    def _stepped_now(self, program: Program, token: int, sampler: SamplerSpec) -> bool:
        """Whether the answer was there at once."""
        if self.random.random() < 0.5:
            return False
        found = self._engine.step_now(ContextId(program.context), token)
        if found is None:
            return False
        self.counts["events"] += 1
        self.counts["steps_now"] += 1
        self._note_drawn(program, [token], sampler, *found)
        return True

    def _turn(self, program: Program, tokens: list[int], sampler: SamplerSpec) -> RequestId:
        """The program waits for a pass."""

        def hear(event: ForwardDone | Failed) -> None:
            if isinstance(event, Failed):
                self._failed(program, event)
            else:
                program.waits_for = None
                self._note_drawn(program, tokens, sampler, event.tokens[0], event.length)

        request = self._request(hear)
        program.waits_for, program.generates = request, False
        return request

    def _note_drawn(
        self, program: Program, fed: list[int], sampler: SamplerSpec, token: int, length: int
    ) -> None:
        shadow = program.shadow
        shadow.tokens += fed
        if length != len(shadow.tokens):
            raise Wrong(f"{program.name} has {len(shadow.tokens)} rows, the engine says {length}")
        shadow.draws.append(Draw(length - 1, sampler, shadow.epoch, token))
        program.last = (token, sampler)

    def _next_tokens(self, program: Program) -> list[int]:
        if not program.shadow.tokens:
            return some_prompt(self.random, VOCABULARY)
        return [self.random.randrange(VOCABULARY) for _ in range(self.random.randint(1, 5))]

    def _failed(self, program: Program, event: Failed) -> None:
        """The context is as it was before."""
        program.waits_for, program.last = None, None
        if event.code == "page-shared" and program.room is not None:
            return
        if event.code not in EXPECTED_FAILURES:
            raise Wrong(f"{program.name}: {event.code}: {event.message}")
        self.counts["timeouts"] += event.code == "deadline-exceeded"

    def _fork(self, program: Program) -> None:
        if len(self._programs) >= self.settings.programs + 8:
            return
        self._numbers += 1
        child = self._numbers
        self.counts["forks_of_staged"] += self._is_staged(program)
        self._send(ForkContext(ContextId(child), ContextId(program.context)))
        twin = self._launch(program.shadow.child(), child)
        twin.name = program.name  # a fork belongs to the process of its source
        self._loop(twin)

    def _is_staged(self, program: Program) -> bool:
        return self._engine.runs_ahead(ContextId(program.context))

    def _truncate(self, program: Program) -> None:
        self._check(program)
        length = self.random.randint(0, len(program.shadow.tokens))
        program.shadow.truncate(length)
        program.last = None
        self._send(TruncateContext(ContextId(program.context), length))

    def _evict(self, program: Program) -> None:
        length = len(program.shadow.tokens)
        if "state" in self.settings.groups or length < 4:
            return
        self.counts["evictions"] += 1
        start = self.random.randint(0, length - 2)
        stop = self.random.randint(start, length - 1)
        program.shadow.evict(start, stop)
        self._send(EvictRows(ContextId(program.context), start, stop))

    def _save(self, program: Program) -> None:
        name = f"s{self.random.randrange(3)}"
        saved = program.shadow.child()

        def hear(event: Answer) -> None:
            program.waits_for = None
            if isinstance(event, Failed):
                if event.code not in {"limit-exceeded", "cancelled"}:
                    raise Wrong(f"saving failed: {event}")
                program.shadow.children -= 1
            else:
                self._snapshots[name] = saved

        request = self._request(hear)
        program.waits_for, program.generates = request, False
        self._send(SaveSnapshot(request, ContextId(program.context), name, b""))

    def _open(self, program: Program) -> None:
        """In place of the program's own context."""
        if not self._snapshots:
            return
        name = self.random.choice(sorted(self._snapshots))
        self._check(program)
        self._send(DropContext(ContextId(program.context)))
        self._numbers += 1
        program.context, program.shadow, program.last = self._numbers, self._snapshots[name].child(), None

        def hear(event: Answer) -> None:
            program.waits_for = None
            if not isinstance(event, SnapshotOpened):
                raise Wrong(f"opening failed: {event}")

        request = self._request(hear)
        program.waits_for, program.generates = request, False
        context, process = ContextId(program.context), ProcessId(program.name)
        self._send(OpenSnapshot(request, context, process, TENANT, name, take=False))

    def _replace(self, program: Program) -> None:
        self._check(program)
        self._programs.remove(program)
        self._send(DropContext(ContextId(program.context)))
        if len(self._programs) < self.settings.programs:
            self._launch()

    def _manage(self, program: Program) -> None:
        """The program reserves pages itself, writes on them, and after a while lets the engine see to it again."""
        if not {"paged", "latent"} & set(self.settings.groups):
            return

        def hear(event: PageCounts | Failed) -> None:
            program.waits_for = None
            if isinstance(event, PageCounts):
                self.counts["managed_pages"] += event.count
                program.room = min(event.count * self.settings.page_size, MAX_ROWS)
            elif event.code not in {"cancelled", "out-of-pages", "limit-exceeded"}:
                raise Wrong(f"managing pages was refused: {event}")

        request = self._request(hear)
        program.waits_for, program.generates = request, False
        self._send(ManagePages(request, ContextId(program.context), reserve=self.random.randint(1, 3)))

    def _use_room(self, program: Program, rows: int) -> None:
        if rows > 0 and self.random.random() < 0.7:
            tokens = [self.random.randrange(VOCABULARY) for _ in range(self.random.randint(1, min(rows, 5)))]
            self._pass(program, tokens, self.random.choice(SAMPLERS))
        else:
            program.room = None
            self._send(EndManaging(ContextId(program.context)))

    # ---- what must hold

    def _check(self, program: Program) -> None:
        """What was drawn until now is to be computed again; all of it at once, at the end."""
        self._checker.add(f"{program.name}, context {program.context}", program.shadow)

    def _end(self) -> None:
        for program in self._programs:
            self._check(program)
            self._send(EndProcess(ProcessId(program.name)))
        for name in self._snapshots:
            self._send(DeleteSnapshot(self._request(lambda _: None), TENANT, name))
        while self._in_flight:
            self._finish()
        self._compare()
        status = self._status()
        held = status.contexts or status.waiting or any(status.swapping.pages)
        if held or status.free_pages != status.total_pages:
            raise Wrong(f"something is left: {status}")
        if self._answers:
            raise Wrong(f"never answered: {sorted(self._answers)}")
        self._count(status)

    def _compare(self) -> None:
        wrong = self._checker.wrong_draws()
        if wrong:
            raise Wrong("; ".join(wrong[:3]))

    def _status(self) -> Status:
        answers: list[Status] = []
        self._send(ReadStatus(self._request(answers.append)))
        return answers[0]

    def _count(self, status: Status) -> None:
        self.counts["oversubscribed_64"] += self.settings.oversubscription == 64
        self.counts["suspensions"] += status.suspensions
        self.counts["replayed_tokens"] += status.replayed_tokens
        self.counts["pages_swapped_out"] += status.swapping.pages_out
        self.counts["pages_swapped_in"] += status.swapping.pages_in
        self.counts["pages_fetched"] += status.swapping.pages_fetched
        self.counts["failed_swaps"] += status.swapping.failures
        self.counts["prefix_hits"] += status.prefix_hit_tokens
        self.counts["cohort_rows"] += status.cohort_rows
        self.counts["run_ahead_hits"] += status.run_ahead_hits
        self.counts["run_ahead_misses"] += status.run_ahead_misses
        self.counts["run_ahead_drops"] += status.run_ahead_drops
        self.counts["draws_checked"] += self._checker.checked
