"""The driver contract over a tiny checkpoint, which a fixture of the test module has written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pie_core.contracts.driver import Driver
from pie_core.testing.any_driver import DriverContract
from pie_core.testing.driver_contract.subject import Answer
from tests.plugins.models.reference import portable


class CheckpointContract(DriverContract):
    """Of the portable driver unless told."""

    tolerance: ClassVar[float] = 1e-5
    page_sizes: ClassVar[Sequence[int]] = (1, 4, 64)
    folder: ClassVar[Path]

    @pytest.fixture(autouse=True)
    def loaded(self, checkpoint: Path) -> None:
        type(self).folder = checkpoint

    def same(self, one: Answer, other: Answer) -> bool:
        """Measured by the largest value: single ones (entropies) have no deviation."""
        return bool(np.abs(one - other).max() <= self.tolerance * float(np.abs(one).max()))

    def make_driver(self, page_size: int | None = None) -> Driver:
        return portable(self.folder, kv_page_size=page_size or 16, host_pages=32)
