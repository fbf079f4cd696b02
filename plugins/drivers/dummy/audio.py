"""The pretended audio codec: frames of codes become samples that depend on every earlier frame of their stream."""

from __future__ import annotations

import numpy as np

from pie_core.contracts.forward import Float32, Int32
from pie_plugins.drivers.dummy.hashing import digest_word, uniform

SAMPLES_PER_FRAME = 240


class AudioDecoder:
    """Keeps one word of state for each open stream."""

    def __init__(self) -> None:
        self._states: dict[int, np.uint64] = {}

    def decode(self, stream: int, codes: Int32, final: bool) -> Float32:
        state = self._states.pop(stream, np.uint64(0))
        states = []
        for frame in codes:
            state = digest_word(state.tobytes(), frame.astype("<i4").tobytes())
            states.append(state)
        if not final:
            self._states[stream] = state
        return uniform(np.array(states, np.uint64), SAMPLES_PER_FRAME).ravel() * np.float32(2) - np.float32(1)
