"""The driver contract over the portable driver: tiny models with windows, and with recurrent state and three axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pie_core.contracts.driver import Driver
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.any_driver import DriverContract
from pie_core.testing.driver_contract.subject import Answer
from pie_plugins.models import gemma4, qwen3_5
from tests.plugins.models.reference import portable
from tests.plugins.models.test_gemma4 import SMALL
from tests.plugins.models.test_qwen3_5 import tiny_qwen


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrids")
    flat = {"max_position_embeddings": 1024, "final_logit_softcapping": 3.0}  # or one token wins every draw
    write_checkpoint(folder / "windows", gemma4.DECLARATION, {**SMALL, **flat})
    write_checkpoint(folder / "state", qwen3_5.DENSE, tiny_qwen(max_position_embeddings=1024))
    return folder


class HybridContract(DriverContract):
    tolerance: ClassVar[float] = 2e-5  # recurrence in chunks rounds other than row by row
    page_sizes: ClassVar[Sequence[int]] = (1, 4, 64)
    name: ClassVar[str]
    folder: ClassVar[Path]

    @pytest.fixture(autouse=True)
    def loaded(self, checkpoints: Path) -> None:
        type(self).folder = checkpoints / self.name

    def same(self, one: Answer, other: Answer) -> bool:
        """Single values (entropies) have no deviation to measure by."""
        scale = max(float(one.std()), float(np.abs(one).max()))
        return bool(np.abs(one - other).max() <= self.tolerance * scale)

    def make_driver(self, page_size: int | None = None) -> Driver:
        return portable(self.folder, kv_page_size=page_size or 16, host_pages=32)


class TestWindows(HybridContract):
    name = "windows"


class TestState(HybridContract):
    name = "state"
