"""Garbage collection in a process that serves for long: what survived is not looked through again and again.

Python's full collections look at everything that lives, and nothing else happens meanwhile: beside ten thousand
connections for half a second. Here they come often, what survives one is set aside, and that is looked at again once
Python's memory has doubled.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = 2  # the generation
_BEFORE_FULL = (
    2  # collections of the middle generation: so few objects are looked at that it takes milliseconds
)


class _SetAside:
    """A callback of the collector."""

    def __init__(self) -> None:
        self._due_at = 0  # blocks of memory; what was set aside and has died since counts no more
        self._is_anew = False

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < _FULL:
            return
        if phase == "start" and sys.getallocatedblocks() >= self._due_at:
            gc.unfreeze()
            self._is_anew = True
        elif phase == "stop":
            gc.freeze()
            if self._is_anew:
                self._due_at, self._is_anew = 2 * sys.getallocatedblocks(), False


def set_survivors_aside() -> None:
    """From now on, beginning with all there is."""
    if not any(isinstance(each, _SetAside) for each in gc.callbacks):
        gc.callbacks.append(_SetAside())
        first, second, _ = gc.get_threshold()
        gc.set_threshold(first, second, _BEFORE_FULL)
    collect_all()


def collect_all() -> None:
    """Looks at everything, set aside or not."""
    gc.unfreeze()
    gc.collect()
    gc.collect()  # over nothing: Python puts full ones off until a quarter has come to what the last one looked at


@contextmanager
def survivors_set_aside() -> Iterator[None]:
    """For a while, in a process that does other things afterwards: then everything is looked at again."""
    callbacks, thresholds = list(gc.callbacks), gc.get_threshold()
    set_survivors_aside()
    try:
        yield
    finally:
        gc.callbacks[:] = callbacks
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        gc.collect()
