"""A context: a history of rows, of which the first `written` have their KV on pages, and the noise it draws from.

    0 ──── written ──── history.length                   rows that there are
    0 ────────────── submitted ─ ─ ─ ─ ┤ ahead ├         rows that steps have computed or are computing

Rows behind `written` wait to be computed: the tokens of a running pass, the last token of a generation (its KV is
written with the next pass, if there is one), or rows that going back on a recurrent model has to compute again. The
last `ahead` rows submitted are guesses (`scheduler.run_ahead`) behind the history's end: nobody else sees them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pie_core.contracts.sampling import derive_stream
from pie_core.engine.evictions import Evictions
from pie_core.engine.history import History
from pie_core.engine.messages import Command, SamplerSpec
from pie_core.errors import PieError
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant
from pie_core.kv_pages.context_pages import ContextPages
from pie_core.kv_pages.raw_pages import RawPages


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The last generation of a context: what breaking it off late goes back to."""

    request: RequestId
    start: int  # rows of the context when its first token was drawn
    generated: int


@dataclass(slots=True, eq=False)
class Context:
    id: ContextId
    process: ProcessId
    tenant: Tenant
    stream: int
    pages: ContextPages
    history: History = field(default_factory=History)
    evictions: Evictions = field(default_factory=Evictions)
    written: int = 0
    submitted: int = 0
    ahead: int = 0
    epoch: int = 0  # how often it was truncated
    children: int = 0  # streams derived so far
    waiting: deque[Command] = field(default_factory=deque)
    busy: bool = False  # a pass of it runs
    unborn: bool = False  # a fork that its source has not got to yet
    dropped: bool = False
    counted: bool = False  # by the quotas of its process and tenant
    fault: PieError | None = None  # what the next request on it is told ...
    lost: bool = False  # ... and every later one: there is nothing behind this id
    last_generation: GenerationEnd | None = None
    prefix: list[bytes] = field(default_factory=list)  # keys of its first blocks, see scheduler.prefixes
    offered: int = 0  # so many of them are there for others
    last_used: int = 0  # a count of passes that ended
    seat: int = -1  # its place in the cohort, see scheduler.cohort; -1 = none
    sampler: SamplerSpec | None = None  # of its last pass, which a Step repeats
    priority: int = 0  # of its passes, unless they say otherwise
    raw: RawPages | None = None  # pages that the program reserves itself

    @property
    def length(self) -> int:
        return self.history.length

    @property
    def position(self) -> int:
        return self.history.position

    @property
    def runs_ahead(self) -> bool:
        """Whether steps may compute rows behind its history, or have."""
        return self.ahead > 0 or self.seat >= 0

    def rewind(self, length: int) -> None:
        """Back to its first `length` rows, as if the later ones had never been; no guess is left."""
        assert not self.runs_ahead, "guesses are dropped first"
        self.history.truncate(length)
        self.evictions.truncate(length)
        blocks = length // self.pages.block_rows
        del self.prefix[blocks:]
        self.offered = min(self.offered, blocks)
        self.submitted = self.written = self.pages.truncate(min(self.written, length))
        if self.raw is not None:
            self.raw.renew(self.pages)

    def claimed_pages(self, group: int) -> int:
        """Those that it holds, and those that are promised to it."""
        return self.pages.num_pages[group] + (0 if self.raw is None else self.raw.promised[group])

    def manage_by_itself(self) -> None:
        """Pages are taken for its passes, as for those of others."""
        if self.raw is not None:
            self.raw.withdraw()
            self.raw = None

    def evict(self, start: int, stop: int) -> None:
        """Rows that are written from now on do not read these."""
        self.evictions.evict(start, stop, self.length)
        self.free_evicted()

    def free_evicted(self) -> None:
        """Frees the pages of evicted rows, unless a row that has to be computed again would read them."""
        if self.evictions.evicted and self.written >= self.evictions.latest:
            self.pages.evict(self.evictions.evicted)

    def suspend(self) -> None:
        """Gives its pages up; its rows are computed again when it goes on."""
        assert not self.runs_ahead, "guesses are dropped first"
        self.pages.release()
        self.written = self.submitted = self.offered = 0

    def take_over(self, other: Context) -> None:
        """Becomes a copy of `other` with a noise stream of its own; pages are shared, not copied."""
        assert not other.runs_ahead, "guesses are dropped first"
        self.pages.release()
        self.pages = other.pages.fork(other.written)
        self.history, self.evictions = other.history.copy(), other.evictions.copy()
        self.written = self.submitted = other.written
        self.prefix, self.offered = list(other.prefix), other.offered
        self.stream = other.derive_stream()
        self.unborn = False

    def derive_stream(self) -> int:
        self.children += 1
        return derive_stream(self.stream, self.children - 1)
