"""The driver contract over the portable driver: tiny models with windows, and with recurrent state and three axes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from pie_core.testing.any_architecture import write_checkpoint
from pie_plugins.models import gemma4, qwen3_5
from tests.plugins.drivers.checkpoint_contract import CheckpointContract
from tests.plugins.models.test_gemma4 import SMALL
from tests.plugins.models.test_qwen3_5 import tiny_qwen


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrids")
    flat = {"max_position_embeddings": 1024, "final_logit_softcapping": 3.0}  # or one token wins every draw
    write_checkpoint(folder / "windows", gemma4.DECLARATION, {**SMALL, **flat})
    write_checkpoint(folder / "state", qwen3_5.DENSE, tiny_qwen(max_position_embeddings=1024))
    return folder


class HybridContract(CheckpointContract):
    tolerance: ClassVar[float] = 2e-5  # recurrence in chunks rounds other than row by row
    name: ClassVar[str]

    @pytest.fixture(autouse=True)
    def loaded(self, checkpoints: Path) -> None:
        type(self).folder = checkpoints / self.name


class TestWindows(HybridContract):
    name = "windows"


class TestState(HybridContract):
    name = "state"
