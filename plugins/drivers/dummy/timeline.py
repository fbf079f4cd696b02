"""The pretended device's own clock: steps follow each other without gaps, however late the host looks."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter, sleep

_SPIN_S = 60e-6  # a sleep may end this much too late, so the last stretch is waited out


@dataclass(frozen=True, slots=True)
class Span:
    """When the device works on a step."""

    start: float
    end: float

    @property
    def busy_s(self) -> float:
        return self.end - self.start


class Timeline:
    """A queue of steps, each as long as its token rows cost."""

    def __init__(self, step_ms: float, token_us: float) -> None:
        self._step_s = step_ms * 1e-3
        self._token_s = token_us * 1e-6
        self._free_at = 0.0

    def enqueue(self, now: float, num_tokens: int) -> Span:
        start = max(now, self._free_at)
        self._free_at = start + self._step_s + num_tokens * self._token_s
        return Span(start, self._free_at)


def wait_until(moment: float) -> None:
    remaining = moment - perf_counter()
    if remaining > _SPIN_S:
        sleep(remaining - _SPIN_S)
    while perf_counter() < moment:
        pass
