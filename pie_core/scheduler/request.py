"""A pass that waits or runs: what it wants of its rows, how far it is, and what it has given so far."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from pie_core.contracts.forward import Float32, Int32, UInt32
from pie_core.engine.context import Context
from pie_core.engine.messages import ProbeValues
from pie_core.errors import PieError
from pie_core.ids import RequestId
from pie_core.kv_pages.page_list import PageCopy

# The numbers of a sampler, by place.
Settings = tuple[float, float, float, float, float, float, float]
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)


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
    broken_off: int | None = None  # keep so many tokens and end


@dataclass(slots=True, eq=False)
class Pass:
    """One request on one context. Its rows are those of the context's history behind `base`."""

    request: RequestId
    context: Context
    base: int  # rows of the context before it
    arrival: int
    samples: SampleRows | None = None
    probes: ProbeRows | None = None
    logit_mask: UInt32 | None = None
    num_drafts: int = 0
    generation: Generation | None = None
    in_flight: bool = False
    ended: PieError | None = None  # it was answered while in flight; its results are dropped
    tokens: dict[int, int] = field(default_factory=dict)  # order -> token
    probed: dict[int, ProbeValues] = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        context = self.context
        return context.history.length - context.written

    @property
    def indivisible(self) -> int:
        """Rows at its end that must be computed in one step: drafts, and the row whose sample verifies the first."""
        return self.num_drafts + 1


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
        return self.stop == self.running.context.length


def rows_within(rows: list[int], start: int, stop: int) -> slice:
    """Which of some ascending rows lie from `start` to `stop`."""
    if rows[0] >= start and rows[-1] < stop:
        return slice(0, len(rows))
    return slice(bisect_left(rows, start), bisect_left(rows, stop))
