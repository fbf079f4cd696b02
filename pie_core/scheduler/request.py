"""A pass that waits or runs: what it wants of its rows, how far it is, and what it has given so far."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from pie_core.contracts.forward import NO_TICKET, Float32, Int32, UInt32
from pie_core.engine.context import Context
from pie_core.engine.messages import ProbeValues
from pie_core.errors import PieError
from pie_core.ids import RequestId, Ticket
from pie_core.kv_pages.page_list import PageCopy

_NO_TICKET = Ticket(NO_TICKET)

# The numbers of a sampler, by place.
Settings = tuple[float, float, float, float, float, float, float]
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)


class Readiness(Enum):
    """Of a pass that waits, for the step that is being chosen."""

    READY = "it has rows to compute"
    NO_ROOM = "it lacks pages"
    JOINS = "others are computing what it begins with"


@dataclass(slots=True, eq=False)
class SampleRows:
    """The samplers of a pass in order of their rows. Rows are KV indexes: they do not move when a pass is split.

    Lists, not arrays: a pass has one sampler as a rule, and the arrays of a step are made at once from all of them.
    """

    rows: list[int]
    order: list[int]  # place among the samples as they were asked for
    settings: list[Settings]
    streams: list[int]
    slots: list[int]
    biases: tuple[tuple[Int32, Float32], ...] = ()  # tokens and values for each sampler; () = none at all
    penalized: bool = False


@dataclass(slots=True, eq=False)
class ProbeRows:
    """The probes of a pass, likewise."""

    rows: list[int]
    order: list[int]
    kinds: list[int]
    temperatures: list[float]
    counts: list[int]
    tokens: list[tuple[int, ...]]


@dataclass(slots=True, eq=False)
class Generation:
    """What makes a pass a loop: each token drawn becomes its next row."""

    start: int  # rows of the context when the first token is drawn: the prompt's end
    stop_tokens: frozenset[int]
    max_tokens: int  # already bounded by the model's length
    generated: int = 0
    whole: bool = False  # its tokens are told all at once, at its end
    asked_at: float = 0.0  # by the engine's clock
    first_at: float | None = None  # when its first token was drawn


@dataclass(slots=True, eq=False)
class Pass:
    """One request on one context: its rows are those of the context's history behind `base`. Or a guess of one."""

    request: RequestId | None  # None: a guess, whose one row is `base`
    context: Context
    base: int  # rows of the context before it
    arrival: int
    samples: SampleRows | None = None
    probes: ProbeRows | None = None
    logit_mask: UInt32 | None = None
    num_drafts: int = 0
    generation: Generation | None = None
    predictable: bool = False  # one sampler, on the last row, and nothing else: what follows can be guessed
    priority: int = 0
    in_flight: int = 0  # steps at the driver that compute rows of it
    ended: PieError | None = None  # it was answered while in flight; its results are dropped
    tokens: dict[int, int] = field(default_factory=dict)  # order -> token
    probed: dict[int, ProbeValues] = field(default_factory=dict)
    # A guess: what draws its token, and where it is. Dropped: nobody will ask for it.
    source: Pass | None = None
    position: int = 0
    computed: bool = False
    dropped: bool = False
    since: int = 0  # the turn at which it began to wait, see Cohort.next_turn
    overtaken: int = 0  # how often others came while it lacked room
    looked_up: bool = False  # its rows were looked for in the prefix cache
    # A predictable pass: where its token is drawn, and the token once it is known.
    ticket: Ticket = _NO_TICKET
    sampler: int = 0
    drawn: int | None = None

    @property
    def stop(self) -> int:
        """The rows of the context with it."""
        return self.context.history.length if self.request is not None else self.base + 1

    @property
    def remaining(self) -> int:
        """Rows that are not at the driver."""
        return self.stop - self.context.submitted

    @property
    def holds_pages(self) -> bool:
        """On the device, and no step is computing rows of it."""
        pages = self.context.pages
        return not self.in_flight and not pages.is_swapped and not pages.is_empty

    @property
    def is_coming(self) -> bool:
        """Nothing of it is on the device yet, or any more."""
        context = self.context
        return context.submitted == 0 or context.pages.is_swapped

    @property
    def wanted_pages(self) -> list[int]:
        """By group: what it has to take until all of its rows are written."""
        return self.context.pages.needed_for(self.context.written, self.stop)

    @property
    def indivisible(self) -> int:
        """Rows at its end that must be computed in one step: drafts, and the row whose sample verifies the first."""
        return self.num_drafts + 1

    def draw_next(self) -> None:
        """A generation goes on with a row for the token that was drawn."""
        assert self.samples is not None
        self.samples.rows[0] += 1
        self.drawn = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows of a pass that one step computes, and the samplers and probes on them."""

    running: Pass
    start: int  # KV indexes
    stop: int
    copies: Sequence[PageCopy]  # pages to copy before
    samples: slice
    probes: slice

    @property
    def is_last(self) -> bool:
        return self.stop == self.running.stop

    @property
    def is_long(self) -> bool:
        """Rows of a prompt: they could be computed in several steps."""
        return self.stop - self.start > self.running.indivisible


def rows_within(rows: list[int], start: int, stop: int) -> slice:
    """Which of some ascending rows lie from `start` to `stop`."""
    if rows[0] >= start and rows[-1] < stop:
        return slice(0, len(rows))
    return slice(bisect_left(rows, start), bisect_left(rows, stop))
