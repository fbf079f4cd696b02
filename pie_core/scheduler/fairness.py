"""Turns between tenants, and between the programs of each: whoever has many contexts has not more turns for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Int64
from pie_core.ids import ProcessId, Tenant
from pie_core.scheduler.request import Pass

T = TypeVar("T")


def in_turns(waiting: Iterable[Pass]) -> Iterator[Pass]:
    """Higher priorities first; among equals one of each tenant, one of each of its programs, and so on round.

    Whoever wants but the first of a thousand pays for little more than looking at each once.
    """
    queues: dict[int, dict[Tenant, dict[ProcessId, list[Pass]]]] = {}
    for each in waiting:
        context = each.context
        tenants = queues.setdefault(each.priority, {})
        processes = tenants.get(context.tenant)
        if processes is None:
            tenants[context.tenant] = processes = {}
        if context.process in processes:
            processes[context.process].append(each)
        else:
            processes[context.process] = [each]
    for priority in sorted(queues, reverse=True):
        yield from _alternating([_alternating(each.values()) for each in queues[priority].values()])


def _alternating(queues: Iterable[Iterable[T]]) -> Iterator[T]:
    """One of each that has some left, round and round."""
    left = deque(map(iter, queues))
    while left:
        queue = left.popleft()
        for each in queue:
            yield each
            left.append(queue)
            break


Numbers = NDArray[np.integer[Any]]


def turn_order(priority: Numbers, tenant: Numbers, process: Numbers, since: Numbers) -> Int64:
    """The same order for things that are columns; in each queue, whoever has waited since earlier comes first."""
    queued = np.lexsort((since, -priority.astype(np.int64)))
    if len(queued) and (tenant == tenant[0]).all() and np.bincount(process).max() == 1:
        return queued.astype(np.int64)  # everybody has one: the usual case
    level = np.unique(priority[queued], return_inverse=True)[1].astype(np.int64) << 32
    round_, of_process = _places_within(level + process[queued])
    tenants = level + tenant[queued]
    mixed = np.lexsort((of_process, round_, tenants))
    turn, of_tenant = np.empty_like(mixed), _places_within(tenants)[1]
    turn[mixed] = _places_within(tenants[mixed])[0]
    return queued[np.lexsort((of_tenant, turn, -level))].astype(np.int64)


def _places_within(groups: Int64) -> tuple[Int64, Int64]:
    """For each, how many of its group stand before it, and where the first of its group stands."""
    by_group = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[by_group], prepend=groups.min(initial=0) - 1))
    group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(groups)))
    place, first = np.empty_like(by_group), np.empty_like(by_group)
    place[by_group] = np.arange(len(groups)) - starts[group]
    first[by_group] = by_group[starts][group]
    return place, first
