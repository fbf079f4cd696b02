"""How far a driver's logits and greedy tokens are from those of an independent implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pie_core.contracts.architecture import ReferenceLogits
from pie_core.contracts.driver import Driver
from pie_core.engine.frames import Row, read_frames
from pie_core.engine.one_context import Reading, read_logits

TOLERANCE = 1e-4  # of the logits' standard deviation


@dataclass(frozen=True, slots=True)
class Parity:
    deviation: (
        float  # the greatest difference of a logit, as a fraction of the reference's standard deviation
    )
    num_tokens: int
    num_greedy: int
    first_difference: int | None  # among the greedy tokens

    @property
    def holds(self) -> bool:
        return self.deviation <= TOLERANCE and self.first_difference is None


def compare(
    driver: Driver, reference: ReferenceLogits, path: Path, tokens: Sequence[Row], num_greedy: int
) -> Parity:
    """The reference reads prompt and continuation as a whole, so cached steps are compared with uncached ones."""
    reading = _read(driver, tokens, num_greedy)
    expected = reference(path, [*tokens, *reading.greedy[:-1].tolist()])
    count = len(tokens)
    difference = np.abs(reading.logits - expected[:count]).max()
    wanted = expected[count - 1 :].argmax(axis=-1)[:num_greedy]
    wrong = np.flatnonzero((wanted != reading.greedy).reshape(num_greedy, -1).any(axis=1))
    return Parity(
        deviation=float(difference / expected[:count].std()),
        num_tokens=count,
        num_greedy=num_greedy,
        first_difference=int(wrong[0]) if len(wrong) else None,
    )


def _read(driver: Driver, tokens: Sequence[Row], num_greedy: int) -> Reading:
    if driver.capabilities.streams > 1:
        return read_frames(driver, tokens, num_greedy)
    return read_logits(driver, [token for token in tokens if isinstance(token, int)], num_greedy)
