"""The grid and every scenario around the engine run to their end in their quick form; figures are not judged."""

from __future__ import annotations

import importlib
import json
import math
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import __main__ as engine
from benchmarks.engine.fit import robust_line
from benchmarks.engine.frontier_plot import frontier_svg
from benchmarks.engine.grid import BARE
from benchmarks.engine.guests import KINDS
from benchmarks.engine.stage import idle_times
from benchmarks.pie_in_process import Step

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled guests are kept between test runs."""
    monkeypatch.setenv("PIE_HOME", str(request.config.cache.mkdir("benchmarks")))


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers(each)
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield value


def test_the_grid_has_every_kind_of_guest_a_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plot = tmp_path / "results.json", tmp_path / "frontier.svg"
    engine.main(["--quick", "--json", str(file), "--plot", str(plot)])
    grid = json.loads(file.read_text(encoding="utf-8"))["grid"]
    assert all(math.isfinite(each) for each in numbers(grid))
    assert {cell["kind"] for cell in grid["cells"]} == {kind.name for kind in KINDS} == set(grid["fits_us"])
    assert {cell["kind"] for cell in grid["bare"]} == {BARE}
    assert all(0 < cell["decode"]["utilisation"] <= 1.01 for cell in grid["cells"])
    table = capsys.readouterr().out.splitlines()[-5:]
    assert all(line.count("|") == table[0].count("|") for line in table)
    drawn = xml.etree.ElementTree.parse(plot).getroot()
    assert len(drawn.findall("{*}polyline")) == len(KINDS)


@pytest.mark.parametrize("scenario", engine.SCENARIOS)
def test_a_scenario_runs(scenario: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    module = importlib.import_module(f"benchmarks.engine.{scenario}")
    module.main(["--quick", "--json", str(file)])
    found = list(numbers(json.loads(file.read_text(encoding="utf-8"))))
    assert found
    assert all(math.isfinite(each) for each in found)


def test_one_outlier_does_not_bend_a_line() -> None:
    points = [(x, 100 + 3.0 * x) for x in (1, 8, 32, 64, 128)]
    line = robust_line([*points, (256, 90_000.0)])
    assert line.b == pytest.approx(3.0)
    assert line.a == pytest.approx(100)


def test_a_device_is_idle_from_the_end_of_a_step_to_the_next_that_was_submitted() -> None:
    def step(submitted_at: float, busy_s: float) -> Step:
        return Step(1, 1, 0.0, 0.0, busy_s, submitted_at, 0.0)

    assert idle_times([step(0, 2), step(1, 2), step(5, 1)]) == [0, 1]


def test_a_plot_has_a_panel_for_each_step_time() -> None:
    drawn = frontier_svg({1.0: {"a": [(1, 1.0), (8, 0.5)]}, 5.0: {"a": [(1, 1.0)], "b <&": [(8, 0.1)]}})
    root = xml.etree.ElementTree.fromstring(drawn)
    assert len(root.findall("{*}polyline")) == 3
    assert "b <&" in {each.text for each in root.findall("{*}text")}
