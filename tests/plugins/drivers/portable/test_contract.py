"""The driver contract over the portable driver, on a tiny llama with swap space."""

from __future__ import annotations

from pathlib import Path

import pytest

from pie_core.testing.any_architecture import write_checkpoint
from pie_plugins.models.llama import DECLARATION
from tests.plugins.drivers.checkpoint_contract import CheckpointContract
from tests.plugins.models.reference import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, DECLARATION, tiny("llama"))
    return folder


class TestPortable(CheckpointContract):
    """As it is."""
