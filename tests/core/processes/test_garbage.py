"""Objects that survive a collection are set aside, and what becomes garbage among them goes when it is their turn."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from pie_core.processes import garbage
from pie_core.processes.garbage import collect_all, set_survivors_aside, survivors_set_aside


class Knot:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def setting_aside() -> Iterator[None]:
    with survivors_set_aside():
        yield


@pytest.mark.usefixtures("setting_aside")
def test_what_survives_a_collection_is_set_aside_and_young_garbage_goes() -> None:
    kept, dropped = Knot(), weakref.ref(Knot())
    aside = gc.get_freeze_count()
    gc.collect()
    assert gc.get_freeze_count() > aside
    assert kept.itself is kept
    assert dropped() is None
    assert not gc.get_objects(generation=2)


@pytest.mark.usefixtures("setting_aside")
def test_garbage_among_what_is_set_aside_goes_once_memory_has_doubled() -> None:
    knot = Knot()
    gc.collect()
    dropped = weakref.ref(knot)
    del knot
    gc.collect()
    assert dropped() is not None
    kept = [[number] for number in range(sys.getallocatedblocks())]
    gc.collect()
    assert dropped() is None
    assert len(kept) > 1


@pytest.mark.usefixtures("setting_aside")
def test_what_was_set_aside_and_has_died_does_not_make_all_be_looked_at_again() -> None:
    """As programs that come and go do: together they are many, and few of them live at a time."""
    knot = Knot()
    gc.collect()
    dropped = weakref.ref(knot)
    del knot
    together = 2 * gc.get_freeze_count()
    while together > 0:
        some = [[number] for number in range(20_000)]
        gc.collect()
        together -= len(some)
    assert dropped() is not None


@pytest.mark.usefixtures("setting_aside")
def test_collecting_all_finds_garbage_that_was_set_aside() -> None:
    knot = Knot()
    gc.collect()
    dropped = weakref.ref(knot)
    del knot
    collect_all()
    assert dropped() is None
    assert not gc.get_objects(generation=2), "what survived is set aside again"


@pytest.mark.usefixtures("setting_aside")
def test_asking_twice_adds_no_second_callback() -> None:
    set_survivors_aside()
    assert [isinstance(each, garbage._SetAside) for each in gc.callbacks].count(True) == 1


def test_afterwards_everything_is_looked_at_again() -> None:
    callbacks, thresholds = list(gc.callbacks), gc.get_threshold()
    with survivors_set_aside():
        knot = Knot()
        gc.collect()
        dropped = weakref.ref(knot)
        del knot
    assert dropped() is None
    assert (gc.callbacks, gc.get_threshold(), gc.get_freeze_count()) == (callbacks, thresholds, 0)
