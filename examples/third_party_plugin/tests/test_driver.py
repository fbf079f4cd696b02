"""The driver keeps pie's contract, and it copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from pie_core.contracts.driver import Driver, DriverRequest
from pie_core.errors import LoadError
from pie_core.testing.any_driver import DriverContract
from pie_core.testing.batches import Request, Sample, Stepper

from pie_copycat import DECLARATION
from pie_copycat.options import Options


def make(checkpoint: Path, page_size: int = 16) -> Driver:
    (checkpoint / "config.json").write_text(json.dumps({"vocab_size": 96}))
    return DECLARATION.load(DriverRequest(checkpoint, "cpu", Options(page_size=page_size), {}, {}))


class TestContract(DriverContract):
    page_sizes: ClassVar[Sequence[int]] = (1, 4, 64)

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_driver(self, page_size: int | None = None) -> Driver:
        return make(self.folder, page_size or 16)


def test_what_came_after_a_token_comes_after_it_again(tmp_path: Path) -> None:
    stepper = Stepper(make(tmp_path))
    context, fed = stepper.context(), [5, 6, 7, 8, 5]
    continued = []
    for _ in range(4):
        result = stepper.run([Request(context, fed, samples=[Sample()])])
        fed = [int(result.tokens[0])]
        continued += fed
    assert continued == [6, 7, 8, 5]


def test_a_checkpoint_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="vocab_size"):
        DECLARATION.load(DriverRequest(tmp_path, "cpu", Options(), {}, {}))
