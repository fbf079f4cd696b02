"""`workers: auto` looks at what the machine, or the container, leaves beside the front and the engines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pie_core.processes.processors import automatic_workers, usable_processors


@pytest.mark.parametrize(
    ("processors", "engines", "workers"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 2), (16, 1, 14), (16, 8, 7), (8, 8, 1), (128, 1, 32)],
)
def test_workers_take_what_the_front_and_the_engines_leave(
    processors: int, engines: int, workers: int
) -> None:
    assert automatic_workers(processors, engines) == workers


@pytest.fixture
def of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("of_eight")
@pytest.mark.parametrize(
    ("files", "usable"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_a_container_has_as_many_processors_as_it_has_time(
    tmp_path: Path, files: dict[str, str], usable: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_processors(tmp_path) == usable
