"""How long programs wait: generations for their first token and between tokens, loops of programs for their passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Int64
from pie_core.engine.histograms import SECONDS, Histogram
from pie_core.scheduler.request import Generation

Float64 = NDArray[np.float64]

_ONE_OF = 16


class Latencies:
    """The time between tokens is a generation's mean, counted once for each of its tokens behind the first.

    Passes of loops are looked at in one step of sixteen: they are many, and a look costs microseconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.first_token = Histogram(SECONDS)
        self.between_tokens = Histogram(SECONDS)
        self.pass_wait = Histogram(SECONDS)
        self._steps = 0

    def asked(self, generation: Generation) -> None:
        """Its prompt is about to wait for its first step."""
        generation.asked_at = self._clock()

    def began(self, generation: Generation) -> None:
        """Its first token was drawn."""
        generation.first_at = self._clock()
        self.first_token.observe(generation.first_at - generation.asked_at)

    def answered(self, asked_at: Float64, places: Int64) -> None:
        """A step gave what loops of programs waited for; `places` among when they had asked."""
        self._steps += 1
        if self._steps % _ONE_OF == 0:
            self.pass_wait.observe_all(self._clock() - asked_at[places])

    def ended(self, generation: Generation) -> None:
        """It has ended well, maybe before its first token."""
        further = generation.generated - 1
        if further > 0 and generation.first_at is not None:
            self.between_tokens.observe((self._clock() - generation.first_at) / further, further)
