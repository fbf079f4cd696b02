"""When requests are to be over at the latest."""

from __future__ import annotations

import heapq

from pie_core.ids import RequestId


class Deadlines:
    def __init__(self) -> None:
        self._heap: list[tuple[float, RequestId]] = []

    def set(self, request: RequestId, moment: float) -> None:
        heapq.heappush(self._heap, (moment, request))

    @property
    def next(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def expired(self, now: float) -> list[RequestId]:
        """Requests whose time is over, each once; some may have been answered."""
        over = []
        while self._heap and self._heap[0][0] <= now:
            over.append(heapq.heappop(self._heap)[1])
        return over
