"""The driver contract over the dummy in every shape, and the check that no driver stays without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from pie_core.contracts.driver import Driver, DriverRequest, Feature
from pie_core.contracts.media import MediaItem
from pie_core.plugins import load_plugins
from pie_core.testing.any_driver import DriverContract
from pie_plugins.drivers.dummy import pie_drivers
from pie_plugins.drivers.dummy.options import DummyOptions


class DummyContract(DriverContract):
    __test__ = False
    options: ClassVar[DummyOptions]
    page_sizes: ClassVar[Sequence[int]] = (1, 4, 64)

    def make_driver(self, page_size: int | None = None) -> Driver:
        values = {name: getattr(self.options, name) for name in DummyOptions.__dataclass_fields__}
        values["page_size"] = page_size or self.options.page_size
        (declaration,) = pie_drivers()
        return declaration.load(DriverRequest(None, "cpu", DummyOptions(**values), {}, {}))

    def adapter_paths(self, folder: Path) -> tuple[Path, Path]:
        paths = folder / "one", folder / "two"
        for path in paths:
            path.write_text(path.name)
        return paths

    def media_items(self) -> tuple[MediaItem, MediaItem]:
        one, two = (
            MediaItem("image", bytes([value]), 5, 3, (1, 1, 5), {"pixels": np.full(5, value, np.float32)})
            for value in (1, 2)
        )
        return one, two


class TestDummy(DummyContract):
    __test__ = True
    options = DummyOptions()


class TestDummyOfEveryGroup(DummyContract):
    __test__ = True
    options = DummyOptions(groups=("paged", "window", "state", "latent"), page_size=4)


class TestDummyOfAWindow(DummyContract):
    __test__ = True
    options = DummyOptions(groups=("paged", "window"), window=21, page_size=8, position_axes=3)


class TestDummyOfState(DummyContract):
    __test__ = True
    options = DummyOptions(groups=("state",))
    page_sizes: ClassVar[Sequence[int]] = ()


class TestDummyOfStreams(DummyContract):
    __test__ = True
    options = DummyOptions(streams=3, vocab_size=60, position_axes=3, page_size=1)


class TestDummyOfNoFeature(DummyContract):
    __test__ = True
    options = DummyOptions(without=tuple(Feature))


class TestDummyOfLevelRequest(DummyContract):
    __test__ = True
    options = DummyOptions(level="request", groups=("paged", "state"))


TESTS = Path(__file__).parents[1]


def test_every_driver_that_is_built_in_stands_under_the_contract() -> None:
    bases = ("(DriverContract)", "(CheckpointContract)")
    suites = [path for path in TESTS.rglob("test_*.py") if any(base in path.read_text() for base in bases)]
    for name in load_plugins().drivers:
        assert any(
            f"pie_plugins.drivers.{name}" in path.read_text() or name in path.parts for path in suites
        ), name


def test_every_media_front_end_that_is_built_in_stands_under_the_contract() -> None:
    suites = [path for path in TESTS.rglob("test_*.py") if "(MediaFrontendContract)" in path.read_text()]
    for name in load_plugins().media:
        assert any(f"pie_plugins.media.{name}" in path.read_text() for path in suites), name
