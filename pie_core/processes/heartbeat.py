"""The sign of life of a process that we started: a thread of its own writes it, so a long step does not stop it.

A beat carries for how long the event loop has not turned, in milliseconds: a loop that hangs while its process lives
shows there. A beat that nobody can receive any more ends an orphan.
"""

from __future__ import annotations

import asyncio
import os
import struct
import threading
import time

PERIOD_S = 0.2
_BEAT = struct.Struct("<I")
_ORPHAN_S = 15.0  # to close the driver; then whoever still hangs is ended


class Heart:
    """In the started process: beats until the process ends."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._loop = asyncio.get_running_loop()
        self._turned = time.monotonic()
        self._turn()
        threading.Thread(target=self._beat, name="pie-heartbeat", daemon=True).start()

    def _turn(self) -> None:
        self._turned = time.monotonic()
        self._loop.call_later(PERIOD_S, self._turn)

    def _beat(self) -> None:
        while True:
            silent_ms = int((time.monotonic() - self._turned) * 1000)
            try:
                os.write(self._pipe, _BEAT.pack(silent_ms))
            except BrokenPipeError:
                break
            time.sleep(PERIOD_S)
        time.sleep(_ORPHAN_S)
        os._exit(1)


def last_beat(beats: bytes) -> float | None:
    """For how long the loop of the other side had not turned, in seconds, by the last whole beat; None: no beat."""
    whole = len(beats) // _BEAT.size * _BEAT.size
    if not whole:
        return None
    (silent_ms,) = _BEAT.unpack_from(beats, whole - _BEAT.size)
    return float(silent_ms) / 1000
