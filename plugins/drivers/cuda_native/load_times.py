"""How long each part of loading takes, by what is told of its progress."""

from __future__ import annotations

from time import perf_counter

from pie_core.contracts.driver import Progress, ProgressCallback

BEGINNING = "beginning"  # before anything is told


class LoadTimes:
    """Passes progress on. A part lasts until another is told of."""

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._part, self._since = BEGINNING, perf_counter()

    def __call__(self, progress: Progress) -> None:
        self._end_part(progress.label)
        self._progress(progress)

    def seconds(self) -> dict[str, float]:
        """Of each part until now, in the order in which they began."""
        self._end_part(self._part)
        return dict(self._seconds)

    def told(self) -> str:
        parts = self.seconds()
        each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        return f"{sum(parts.values()):.1f} s ({each})"

    def _end_part(self, following: str) -> None:
        now = perf_counter()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = following, now
