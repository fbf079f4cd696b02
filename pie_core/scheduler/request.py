"""A pass that waits or runs: what it wants of its rows, how far it is, and what it has given so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Float32, Int32, UInt8, UInt32, UInt64
from pie_core.engine.context import Context
from pie_core.engine.messages import ProbeValues
from pie_core.errors import PieError
from pie_core.ids import RequestId
from pie_core.kv_pages.page_list import PageCopy

# The columns of SampleRows.settings.
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(7)


@dataclass(slots=True, eq=False)
class SampleRows:
    """The samplers of a pass in order of their rows. Rows are KV indexes: they do not move when a pass is split."""

    rows: Int32
    order: Int32  # place among the samples as they were asked for
    settings: NDArray[np.float64]  # [n, 7]
    streams: UInt64
    slots: UInt32
    biases: tuple[tuple[Int32, Float32], ...] = ()  # tokens and values for each sampler; () = none at all
    penalized: bool = False

    def within(self, start: int, stop: int) -> slice:
        return _within(self.rows, start, stop)


@dataclass(slots=True, eq=False)
class ProbeRows:
    """The probes of a pass, likewise."""

    rows: Int32
    order: Int32
    kinds: UInt8
    temperatures: Float32
    counts: Int32
    tokens: tuple[Int32, ...]

    def within(self, start: int, stop: int) -> slice:
        return _within(self.rows, start, stop)


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
        return self.context.unwritten

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
    copies: tuple[PageCopy, ...]  # pages to copy before
    samples: slice
    probes: slice

    @property
    def is_last(self) -> bool:
        return self.stop == self.running.context.length


def _within(rows: Int32, start: int, stop: int) -> slice:
    if not len(rows) or (rows[0] >= start and rows[-1] < stop):
        return slice(0, len(rows))
    low, high = np.searchsorted(rows, (start, stop))
    return slice(int(low), int(high))
