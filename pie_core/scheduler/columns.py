"""The cohort's memory: one array for each quantity, in which every context has a place of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Bool, Float32, Int32, Int64, UInt32, UInt64

NOBODY = -1  # in `request`
_FIRST_SIZE = 16
_FEW_STOPS = 4


class Columns:
    """Grows by doubling. Places that are not taken are not ripe: `submitted` and `goal` are 0 there."""

    # rows of the context: written <= submitted, and those that somebody has asked for
    written: Int32
    submitted: Int32
    claimed: Int32
    flushed: Int32  # ... of which the context's history has so many
    goal: Int32  # rows may be submitted while there are fewer than this
    bound: Int32  # what the goal never exceeds: the model's and the cache's length
    end: Int32  # a generation has ended with so many rows
    shift: Int32  # position - row
    # where the token of row `submitted` is drawn, while it is not known
    ticket: Int64
    sampler: Int32
    # who it is
    stamp: Int64  # changes when the context leaves: results of steps under way are for another
    context: Int64
    request: Int64  # a generation, or the pass that waits for its result; NOBODY
    loops: Bool  # a generation
    is_told: Bool  # ... whose tokens are wanted as they come
    is_step: Bool  # its request is a Step
    is_staged: Bool  # the pass before it is still at the driver
    priority: Int64
    process: Int32  # numbers, see cohort.Names
    tenant: Int32
    turn: Int64  # the step that took it last
    arrival: Int64
    asked_at: NDArray[np.float64]
    used: Int64  # as Context.last_used
    # how tokens are drawn
    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    stream: UInt64
    epoch: UInt32

    def __init__(self, ring: int) -> None:
        self.size = 0
        self.names: dict[str, Any] = {
            **dict.fromkeys(("written", "submitted", "claimed", "flushed", "goal"), np.int32),
            **dict.fromkeys(("bound", "end", "shift", "sampler", "process", "tenant"), np.int32),
            **dict.fromkeys(
                ("ticket", "stamp", "context", "request", "priority", "turn", "arrival", "used"), np.int64
            ),
            **dict.fromkeys(("loops", "is_told", "is_step", "is_staged"), np.bool_),
            **dict.fromkeys(("temperature", "top_p", "min_p"), np.float32),
            **{"asked_at": np.float64, "top_k": np.int32, "stream": np.uint64, "epoch": np.uint32},
        }
        for name, dtype in self.names.items():
            setattr(self, name, np.zeros(0, dtype))
        self.tokens: Int32 = np.zeros((0, ring), np.int32)  # token i of a context at i % ring, see cohort
        self.stops: Int32 = np.zeros((0, _FEW_STOPS), np.int32)  # -1 where there are fewer

    def grow(self) -> None:
        added = max(self.size, _FIRST_SIZE)
        for name in self.names:
            setattr(self, name, _longer(getattr(self, name), added))
        self.tokens, self.stops = _longer(self.tokens, added), _longer(self.stops, added)
        self.size += added

    def widen_stops(self, width: int) -> None:
        if width > self.stops.shape[1]:
            wider = np.full((self.size, 2 * width), -1, np.int32)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider


def _longer(values: NDArray[Any], added: int) -> NDArray[Any]:
    return np.concatenate([values, np.zeros((added, *values.shape[1:]), values.dtype)])
