"""Every message between a sandbox worker and an engine. Plain typed values: the same in one process and between two.

The worker chooses context and request ids and sends commands; the engine answers each request with exactly one final
event (`Ack`, `Failed`, `ForwardDone`, …), after any number of `Generated` events for a generation. Commands take effect
in the order they were sent, and so do the passes of one context; commands without a request id cannot fail by
themselves: what is wrong shows in the next request on that context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from pie_core.contracts.driver import Feature
from pie_core.engine.histograms import Distribution
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """A value that crosses the port; encodes to MessagePack as it is, without the names of its fields."""


class SamplerSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How to draw a token: see `contracts.forward.Samplers` for meaning, order and neutral values."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int | None = None  # None: the context's own stream
    bias_tokens: tuple[int, ...] = ()
    bias_values: tuple[float, ...] = ()


class Sample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    row: int  # input row of the pass
    sampler: SamplerSpec


class Probe(msgspec.Struct, frozen=True, array_like=True, gc=False):
    row: int
    kind: int  # contracts.forward.ProbeKind
    temperature: float = 1.0
    k: int = 0
    tokens: tuple[int, ...] = ()


class ProbeValues(msgspec.Struct, frozen=True, array_like=True, gc=False):
    token_ids: list[int]  # DISTRIBUTION only
    values: bytes  # little-endian float32


class ModelInfo(msgspec.Struct, frozen=True):
    """What a worker knows of a model before it asks anything."""

    name: str
    driver: str
    architecture: str
    vocab_size: int
    max_model_len: int
    page_size: int  # of the first paged group
    features: frozenset[Feature]


# ---- commands: worker -> engine


class CreateContext(Message, frozen=True):
    context: ContextId
    process: ProcessId
    tenant: Tenant
    seed: int  # its noise stream, 64 bits
    priority: int = (
        0  # of its passes, unless they say otherwise: higher ones go first, and give their pages up last
    )


class ForkContext(Message, frozen=True):
    context: ContextId
    source: ContextId


class TruncateContext(Message, frozen=True):
    context: ContextId
    length: int  # KV rows to keep


class EvictRows(Message, frozen=True):
    """Rows that the context gets from now on do not read these; a page is freed once all its rows are evicted."""

    context: ContextId
    start: int  # KV rows
    stop: int


class PinRows(Message, frozen=True):
    """Later evictions leave these rows alone."""

    context: ContextId
    start: int
    stop: int


class SetPriority(Message, frozen=True):
    """Of the passes that come behind it, unless they say otherwise; forks have it from their source."""

    context: ContextId
    priority: int


class ManagePages(Message, frozen=True):
    """The program manages the context's pages from now on: no pass takes or copies one. Answered by PageCounts.

    In this order `commit` full pages stay as they are, `release` empty ones at the end are given back, and `reserve`
    more are taken; counted in pages of the first paged group. Refused as a whole.
    """

    request: RequestId
    context: ContextId
    commit: int = 0
    release: int = 0
    reserve: int = 0


class EndManaging(Message, frozen=True):
    """Pages are taken for the context's passes again; what was reserved and holds no rows is given back."""

    context: ContextId


class DropContext(Message, frozen=True):
    context: ContextId


class EndProcess(Message, frozen=True):
    """Frees everything the process has: contexts, running passes, generations."""

    process: ProcessId


class Forward(Message, frozen=True):
    request: RequestId
    context: ContextId
    tokens: tuple[int, ...]  # drafts included, at the end
    positions: tuple[int, ...] | None = None  # None: the context's next positions
    masks: tuple[tuple[int, ...], ...] = ()  # run lengths, one row for each token; () = causal
    logit_mask: tuple[int, ...] | None = None  # run lengths over the vocabulary; None = all allowed
    samples: tuple[Sample, ...] = ()
    probes: tuple[Probe, ...] = ()
    num_drafts: int = 0
    pass_speculation: bool = True
    timeout_s: float | None = None  # from its arrival; None: the engine's own, if it has one
    priority: int | None = None  # None: the context's
    trace: str | None = None  # the traceparent of who asks, where that is recorded
    masks_attention_only: bool = False  # masks are meant to hide nothing from recurrent layers


class Generate(Message, frozen=True):
    request: RequestId
    context: ContextId
    tokens: tuple[int, ...]  # prompt to feed first; at least one
    sampler: SamplerSpec
    stop_tokens: tuple[int, ...]
    max_tokens: int  # 0: until the model's length ends
    timeout_s: float | None = None
    priority: int | None = None
    whole: bool = False  # one Generated at the end, with all tokens
    trace: str | None = None


class Step(Message, frozen=True):
    """One more turn of a loop: a token at the next position, and the sampler of the context's last pass once more.

    Answered by `Stepped` or `Failed`; guesses may follow it, and priority and time limit are those of a plain pass.
    """

    request: RequestId
    context: ContextId
    token: int


class Steps(Message, frozen=True):
    """Many `Step`s at once, by place."""

    requests: list[RequestId]
    contexts: list[ContextId]
    tokens: list[int]


class BreakOff(Message, frozen=True):
    """Ends a generation early; the context keeps its prompt and the first `consumed` generated tokens."""

    request: RequestId
    generation: RequestId
    consumed: int | None  # None: all that there are


class Cancel(Message, frozen=True):
    """Ends a request with `Failed(code="cancelled")`; one that is already answered stays answered."""

    target: RequestId


class SaveSnapshot(Message, frozen=True):
    request: RequestId
    context: ContextId
    name: str
    attachment: bytes  # the worker's own state of the context, given back on open


class OpenSnapshot(Message, frozen=True):
    request: RequestId
    context: ContextId  # the new context
    process: ProcessId
    tenant: Tenant
    name: str
    take: bool  # the snapshot is gone afterwards
    priority: int = 0


class DeleteSnapshot(Message, frozen=True):
    request: RequestId
    tenant: Tenant
    name: str
    saved_before: float | None = None  # seconds since 1970: a newer one stays


class ListSnapshots(Message, frozen=True):
    request: RequestId
    tenant: Tenant


class ReadTokens(Message, frozen=True):
    """Asks for the token history of a context."""

    request: RequestId
    context: ContextId


class ReadStatus(Message, frozen=True):
    request: RequestId
    processes: bool = False  # also what each process has and uses


Command = (
    CreateContext
    | ForkContext
    | TruncateContext
    | EvictRows
    | PinRows
    | SetPriority
    | ManagePages
    | EndManaging
    | DropContext
    | EndProcess
    | Forward
    | Generate
    | Step
    | Steps
    | BreakOff
    | Cancel
    | SaveSnapshot
    | OpenSnapshot
    | DeleteSnapshot
    | ListSnapshots
    | ReadTokens
    | ReadStatus
)


# ---- events: engine -> worker


class Ack(Message, frozen=True):
    request: RequestId


class Failed(Message, frozen=True):
    """The request ended with the error that `errors.error_from_code` finds; the context is as it was before it."""

    request: RequestId
    code: str
    message: str


class ForwardDone(Message, frozen=True):
    request: RequestId
    tokens: list[int]  # one for each sample, in order; with drafts: of the accepted rows and the one after
    probes: list[ProbeValues]
    length: int  # KV rows of the context now
    position: int  # the next token's


class Generated(Message, frozen=True):
    """More tokens of a generation; `finish` on the last event: "stop", "length" or "cancelled"."""

    request: RequestId
    tokens: list[int]
    finish: str | None
    length: int
    position: int


class Stepped(Message, frozen=True):
    """The ends of `Step`s, by place: one token each, and what the context is now."""

    requests: list[RequestId]
    tokens: list[int]
    lengths: list[int]
    positions: list[int]


class Progress(Message, frozen=True):
    """One more token of each of these generations, none of which has ended."""

    requests: list[RequestId]
    tokens: list[int]
    lengths: list[int]
    positions: list[int]


class SnapshotOpened(Message, frozen=True):
    request: RequestId
    length: int
    position: int
    attachment: bytes


class SnapshotNames(Message, frozen=True):
    request: RequestId
    names: list[str]
    saved_at: list[float]  # seconds since 1970, one for each name


class Tokens(Message, frozen=True):
    request: RequestId
    tokens: list[int]


class ProcessUse(msgspec.Struct, frozen=True):
    """What the contexts of one process have and have used of a model."""

    process: ProcessId
    contexts: int
    pages: int  # of all cache groups; those that contexts share count for each
    open_requests: int  # passes and generations that are not answered
    tokens: int  # fed and drawn since it began


class SwapUse(msgspec.Struct, frozen=True):
    """Contexts in host memory, and how they got there and back."""

    contexts: int = 0  # that are there now
    bytes: int = 0  # that they and snapshots take
    pages: list[int] = []  # the same, per cache group
    total_pages: list[int] = []
    suspensions: int = 0  # that went there; the others are computed again
    failures: int = 0  # swaps that the driver refused
    pages_out: int = 0  # copied to host memory
    bytes_out: int = 0
    pages_in: int = 0  # ... and back
    bytes_in: int = 0
    cached_pages: list[
        int
    ] = []  # per cache group: of host memory, as good as free; the prefix cache holds them
    pages_fetched: int = 0  # of pages_in, those that the prefix cache wanted


class PageCounts(Message, frozen=True):
    """Pages of a context whose program manages them."""

    request: RequestId
    committed: int
    count: int  # with those that are committed
    length: int  # KV rows


class Status(Message, frozen=True):
    request: RequestId
    contexts: int
    waiting: int  # requests that are not in a batch
    running: int
    free_pages: list[int]  # per cache group; with those that only the prefix cache holds
    total_pages: list[int]
    steps: int
    tokens: int  # token rows computed
    busy_s: float  # device time
    passes: int = 0  # rows of batches: contexts that steps computed something for
    schedule_s: float = 0.0  # what the host took to choose and lay out steps
    deliver_s: float = 0.0  # ... and to record what they gave
    run_ahead_hits: int = 0  # passes served from a guess
    run_ahead_misses: int = 0  # passes that were not what was guessed
    run_ahead_drops: int = 0  # guesses that were computed for nothing
    cached_pages: list[int] = []  # pages that only the prefix cache holds
    prefix_hit_tokens: int = 0  # rows that were taken over instead of computed
    suspensions: int = 0  # contexts that gave their pages up to others
    replayed_tokens: int = 0  # ... and how many rows they had
    groups: list[str] = []  # the names of the cache groups
    sampled_tokens: int = 0  # drawn by steps, guesses included
    prefix_lookup_tokens: int = 0  # rows of prompts that were looked for in the prefix cache
    failed_passes: int = 0  # that a driver did not compute
    timeouts: int = 0  # requests that took longer than they may
    batch_sizes: Distribution = Distribution()  # passes of a step
    step_seconds: Distribution = Distribution()  # device time of a step
    first_token_seconds: Distribution = Distribution()  # of generations, from when they were asked for
    between_tokens_seconds: Distribution = Distribution()
    processes: list[ProcessUse] = []  # if they were asked for
    swapping: SwapUse = SwapUse()
    pass_wait_seconds: Distribution = Distribution()  # of programs that step by themselves, see Latencies
    shared_rows: int = 0  # KV rows that steps need not read once more, because passes of a batch share them
    cohort_rows: int = 0  # rows of steps that were laid out as arrays, see scheduler.cohort


Event = (
    Ack
    | Failed
    | ForwardDone
    | Generated
    | Stepped
    | Progress
    | SnapshotOpened
    | SnapshotNames
    | Tokens
    | PageCounts
    | Status
)

Answer = (
    Ack | Failed | ForwardDone | Generated | SnapshotOpened | SnapshotNames | Tokens | PageCounts | Status
)

EventSink = Callable[[Sequence[Event]], None]


def opened_by(commands: Iterable[Command]) -> list[RequestId]:
    """The requests that these commands ask for, each of which an event is going to end."""
    opened: list[RequestId] = []
    for each in commands:
        if type(each) is Steps:
            opened += each.requests
        elif (request := getattr(each, "request", None)) is not None:
            opened.append(request)
    return opened


def ended_by(events: Iterable[Event]) -> list[RequestId]:
    """The requests that have no more events to come."""
    ended: list[RequestId] = []
    for each in events:
        if isinstance(each, Stepped):
            ended += each.requests
        elif not isinstance(each, Progress) and (not isinstance(each, Generated) or each.finish is not None):
            ended.append(each.request)
    return ended


def one_by_one(event: Event) -> Sequence[Answer]:
    """What an event of many requests says, as an event of each."""
    if isinstance(event, Stepped):
        columns = (event.requests, event.tokens, event.lengths, event.positions)
        return [
            ForwardDone(request, [token], [], *rest) for request, token, *rest in zip(*columns, strict=True)
        ]
    if isinstance(event, Progress):
        columns = (event.requests, event.tokens, event.lengths, event.positions)
        return [
            Generated(request, [token], None, *rest) for request, token, *rest in zip(*columns, strict=True)
        ]
    return (event,)


def by_owner(events: Iterable[Event], owner: Callable[[RequestId], int]) -> dict[int, list[Event]]:
    """What each owner of requests is told."""
    told: dict[int, list[Event]] = {}
    for event in events:
        if isinstance(event, Stepped | Progress):
            for whose, part in _parts(event, owner).items():
                told.setdefault(whose, []).append(part)
        else:
            told.setdefault(owner(event.request), []).append(event)
    return told


def _parts(event: Stepped | Progress, owner: Callable[[RequestId], int]) -> dict[int, Event]:
    if owner(min(event.requests)) == (only := owner(max(event.requests))):  # owners have ranges of requests
        return {only: event}
    rows: dict[int, list[tuple[RequestId, int, int, int]]] = {}
    for row in zip(event.requests, event.tokens, event.lengths, event.positions, strict=True):
        rows.setdefault(owner(row[0]), []).append(row)
    return {
        whose: type(event)(
            [request for request, _, _, _ in mine],
            [token for _, token, _, _ in mine],
            [length for _, _, length, _ in mine],
            [position for _, _, _, position in mine],
        )
        for whose, mine in rows.items()
    }


class EnginePort(Protocol):
    """A worker's side of one engine. Not thread-safe: one event loop uses it."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def is_ready(self) -> bool:
        """False while there is no engine behind it."""
        ...

    def send(self, command: Command) -> None:
        """Never blocks and never raises for what the command asks."""
        ...

    def send_last(self, build: Callable[[], Command | None]) -> None:
        """Sends what `build` makes behind all else, when what was sent until then is taken; None: nothing."""
        ...

    def step_now(self, context: ContextId, token: int) -> tuple[int, int] | None:
        """A `Step` of a context of which no request is open, if it can be answered at once: its token and length."""
        ...

    def hurry(self) -> None:
        """Takes what was sent now, not in the event loop's next turn: whoever had something to send has done so."""
        ...

    def listen(self, sink: EventSink) -> None:
        """`sink` gets all events of a step in one call, on the worker's event loop."""
        ...

    async def close(self) -> None:
        """Ends every request with `EngineLost` and frees the model."""
        ...
