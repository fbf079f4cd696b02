"""Nothing that an engine or a server counts is forgotten on its way to Prometheus."""

from __future__ import annotations

from itertools import count
from typing import Any, get_args, get_type_hints

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pie_core.engine.histograms import Distribution
from pie_core.engine.messages import Status
from pie_core.server.metrics import Metrics
from pie_core.server.status import (
    EngineStatus,
    GroupStatus,
    ModelStatus,
    ReplicaStatus,
    ServerStatus,
    WorkerStatus,
)

# What stands in a status by another name, or as part of something else.
RENAMED = {"request", "busy_s", "free_pages", "total_pages", "cached_pages", "swapping", "processes"}


def filled(kind: type[msgspec.Struct], numbers: count[int], **given: Any) -> Any:
    """With a number of its own in every field that holds one, or could."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name in kind.__struct_fields__:
        if name in given:
            values[name] = given[name]
        elif hints[name] is Distribution:
            values[name] = Distribution((1.0,), (1, next(numbers)), next(numbers))
        elif int in (types := get_args(hints[name]) or (hints[name],)) or float in types:
            values[name] = next(numbers)
    return kind(**values)


def a_status() -> tuple[ServerStatus, int]:
    """And the number behind the last one in it."""
    numbers = count(1001)
    group = filled(GroupStatus, numbers, name="paged", total=9000)
    engine = filled(EngineStatus, numbers, groups=[group])
    replica = filled(ReplicaStatus, numbers, state="ready", engine=engine)
    model = filled(ModelStatus, numbers, name="m", state="loaded", replicas=[replica])
    status = filled(
        ServerStatus,
        numbers,
        version="1",
        state="ready",
        ended={"returned": next(numbers)},
        models=[model],
        workers=[filled(WorkerStatus, numbers)],
        plugins=[],
        processes=[],
    )
    return status, next(numbers)


def test_what_an_engine_tells_is_in_the_status() -> None:
    assert set(Status.__struct_fields__) - RENAMED - set(EngineStatus.__struct_fields__) == set()


def test_every_number_of_a_status_is_a_metric() -> None:
    status, last = a_status()
    text = Metrics().exposed(status).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    exposed = {sample.value for sample in samples}
    exposed |= {sample.value - 1 for sample in samples if sample.name.endswith("_bucket")}
    numbers = set(range(1001, last)) - {
        status.uptime_s,  # process_start_time_seconds tells
        status.models[0].replicas[0].pid,
        status.workers[0].pid,
        status.models[0].replicas[0].engine.groups[0].swap_total,  # type: ignore[union-attr]
    }
    assert numbers - exposed == set()


def test_free_pages_are_those_that_are_neither_used_nor_cached() -> None:
    status, _ = a_status()
    (family,) = (
        each
        for each in text_string_to_metric_families(Metrics().exposed(status).decode())
        if each.name == "pie_kv_pages"
    )
    pages = {sample.labels["state"]: sample.value for sample in family.samples}
    assert pages.pop("swapped") > 0
    assert sum(pages.values()) == 9000


def test_names_follow_their_kind() -> None:
    for each in Metrics().described():
        assert each.name.startswith("pie_")
        assert each.name.endswith("_total") == (each.kind == "counter"), each.name
        assert each.name.islower()
