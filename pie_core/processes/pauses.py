"""How long to wait before a process that was lost is started again."""

from __future__ import annotations

import time

_STABLE_S = 60.0  # a process that lived so long is replaced at once
_FIRST_S = 0.1
_LONGEST_S = 30.0


class Pauses:
    """Longer each time, so that what cannot live does not keep the machine busy."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._began: float | None = None

    def begin(self) -> None:
        """A process has started to work."""
        self._began = time.monotonic()

    def next_s(self) -> float:
        if self._began is not None and time.monotonic() - self._began > _STABLE_S:
            self._next_s = 0.0
        self._began = None
        pause_s, self._next_s = self._next_s, min(max(2 * self._next_s, _FIRST_S), _LONGEST_S)
        return pause_s
