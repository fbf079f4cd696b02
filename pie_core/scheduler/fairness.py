"""Turns between tenants, and between the programs of each: whoever has many contexts has not more turns for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from pie_core.scheduler.request import Pass

T = TypeVar("T")


def in_turns(waiting: Sequence[Pass]) -> list[Pass]:
    """Higher priorities first; among equals one of each tenant, one of each of its programs, and so on round."""
    ordered: list[Pass] = []
    for alike in _grouped(sorted(waiting, key=lambda each: -each.priority), lambda each: each.priority):
        tenants = _grouped(alike, lambda each: each.context.tenant)
        ordered += _alternating([list(_alternating(_by_process(passes))) for passes in tenants])
    return ordered


def _by_process(waiting: Iterable[Pass]) -> list[list[Pass]]:
    return _grouped(waiting, lambda each: each.context.process)


def _grouped(waiting: Iterable[Pass], key: Callable[[Pass], object]) -> list[list[Pass]]:
    groups: dict[object, list[Pass]] = {}
    for each in waiting:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def _alternating(queues: Sequence[Sequence[T]]) -> Iterator[T]:
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue):
                yield queue[place]
