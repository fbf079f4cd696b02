"""The driver contract over the CUDA driver: with graphs and without, on its plain operations where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from pie_core.contracts.driver import Driver
from pie_core.testing.any_architecture import write_checkpoint
from pie_plugins.models.llama import DECLARATION
from tests.plugins.drivers.checkpoint_contract import CheckpointContract
from tests.plugins.drivers.cuda_native.machine import cuda_native
from tests.plugins.models.reference import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, DECLARATION, tiny("llama"))
    return folder


class CudaNativeContract(CheckpointContract):
    __test__ = False
    options: ClassVar[dict[str, Any]] = {}

    def make_driver(self, page_size: int | None = None) -> Driver:
        return cuda_native(self.folder, kv_page_size=page_size or 16, host_pages=32, **self.options)


class TestEager(CudaNativeContract):
    __test__ = True
    options: ClassVar[dict[str, Any]] = {"cuda_graphs": False}


class TestReplayed(CudaNativeContract):
    __test__ = True
    options: ClassVar[dict[str, Any]] = {"cuda_graphs": True, "graph_drafts": 4}
