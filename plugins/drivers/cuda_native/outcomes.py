"""What steps leave on the device for later ones: sampled tokens, last accepted tokens, lengths, failures.

A ring of rows, one for each of the last steps. A reference of a batch to an earlier ticket becomes a place in this
ring, so the step that reads it is queued before anybody on the host knows the value. A row, in int32 words:

    fail [R] | accepted [R] | last [R] | length [R] | tokens [S] | live [S]

`fail` holds a `Failure`; `live` is 0 for tokens sampled behind a rejected draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from pie_core.contracts.forward import Int32, Int64
from pie_core.ids import Ticket
from pie_plugins.drivers.cuda_native.timeline import Timeline

KEPT_TICKETS = 64  # how many steps back a reference may reach
NOWHERE = -1


class Failure(IntEnum):
    """Why the device failed a request; the larger one wins."""

    NONE = 0
    DEPENDENCY = 1
    NOTHING_ALLOWED = 2
    NOT_A_NUMBER = 3
    REFUSED = 4  # the host knows why


CAUSES = {
    Failure.DEPENDENCY: "a token, a length or the history comes from a request of an earlier step that failed",
    Failure.NOTHING_ALLOWED: "no token is allowed: the logit mask and bias hide all",
    Failure.NOT_A_NUMBER: "the logits are not numbers",
}


@dataclass(frozen=True)
class RingLayout:
    """Where the parts of one row begin. R is one more than a step's requests: recorded ones settle padding, too."""

    max_requests: int
    max_samplers: int

    @cached_property
    def accepted(self) -> int:
        return self.max_requests + 1

    @cached_property
    def last(self) -> int:
        return 2 * self.accepted

    @cached_property
    def length(self) -> int:
        return 3 * self.accepted

    @cached_property
    def tokens(self) -> int:
        return 4 * self.accepted

    @cached_property
    def live(self) -> int:
        return self.tokens + self.max_samplers

    @cached_property
    def width(self) -> int:
        return self.live + self.max_samplers


@dataclass(frozen=True, slots=True)
class KeptStep:
    """What the host remembers of a step to which references may point."""

    base: int  # of its row in the ring
    num_requests: int
    sampler_requests: Int64  # [S]
    failed: Mapping[int, str]  # what the host refused


class RingRow:
    """One row of the ring: where a step leaves what it gives, its copy on the host, and when the device works on it."""

    def __init__(self, base: int, device: Tensor, mirror: Tensor, timeline: Timeline) -> None:
        self.base = base
        self.ticket: Ticket | None = None  # of the step that is kept
        self.started, self.done = timeline.unset_mark(), timeline.unset_mark()
        self.values: Int32 = mirror.numpy()  # what was fetched
        self._device, self._mirror, self._timeline = device, mirror, timeline
        self._fetched = device, mirror  # as much of both as was fetched last

    def fetch(self, words: int) -> None:
        """Copies its beginning to the host, without waiting. Steps of one size follow each other."""
        source, target = self._fetched
        if len(source) != words:
            source, target = self._fetched = self._device[:words], self._mirror[:words]
        self._timeline.fetch(source, target)


class Outcomes:
    """The ring, its mirror on the host, and who stands in it. A step's row is fetched into the same place there: far
    fewer steps are open than the ring has rows."""

    def __init__(self, layout: RingLayout, timeline: Timeline) -> None:
        self.layout = layout
        shape = (KEPT_TICKETS * layout.width,)
        self.ring: Tensor = torch.zeros(shape, dtype=torch.int32, device=timeline.device)
        self.mirror: Tensor = timeline.pinned(shape, torch.int32)
        self._rows = [
            RingRow(place * layout.width, *pair, timeline)
            for place, pair in enumerate(
                zip(self.ring.split(layout.width), self.mirror.split(layout.width), strict=True)
            )
        ]
        self._kept: dict[Ticket, KeptStep] = {}
        self._next = 0

    def claim(self) -> RingRow:
        """The row for the next step; what stood there is forgotten."""
        row = self._rows[self._next]
        self._next = (self._next + 1) % KEPT_TICKETS
        if row.ticket is not None:
            self.forget(row.ticket)
            row.ticket = None
        return row

    def keep(self, ticket: Ticket, row: RingRow, step: KeptStep) -> None:
        row.ticket = ticket
        self._kept[ticket] = step

    def forget(self, ticket: Ticket) -> None:
        """Nobody may refer to the step, any more or because it failed as a whole."""
        self._kept.pop(ticket, None)

    def find(self, ticket: int) -> KeptStep | None:
        return self._kept.get(Ticket(ticket))
