"""How long generations wait for their first token and between tokens; two looks at the clock for each generation."""

from __future__ import annotations

from collections.abc import Callable

from pie_core.engine.histograms import SECONDS, Histogram
from pie_core.scheduler.request import Generation


class Latencies:
    """The time between tokens is a generation's mean, counted once for each of its tokens behind the first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.first_token = Histogram(SECONDS)
        self.between_tokens = Histogram(SECONDS)

    def asked(self, generation: Generation) -> None:
        """Its prompt is about to wait for its first step."""
        generation.asked_at = self._clock()

    def began(self, generation: Generation) -> None:
        """Its first token was drawn."""
        generation.first_at = self._clock()
        self.first_token.observe(generation.first_at - generation.asked_at)

    def ended(self, generation: Generation) -> None:
        """It has ended well, maybe before its first token."""
        further = generation.generated - 1
        if further > 0 and generation.first_at is not None:
            self.between_tokens.observe((self._clock() - generation.first_at) / further, further)
