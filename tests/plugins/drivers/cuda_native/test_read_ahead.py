"""Tensors that are read before they are asked for: the same ones, within the memory there is, errors in their turn."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Lock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pie_core.errors import LoadError
from pie_plugins.drivers.cuda_native.read_ahead import ReadAhead, in_memory
from pie_plugins.models.layers.safetensors_checkpoint import SafetensorsCheckpoint

NAMES = [f"tensor{number}" for number in range(12)]
BYTES = 400  # of each tensor


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "any"}')
    tensors = {name: torch.full((100,), float(number)) for number, name in enumerate(NAMES)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


class Counting:
    """Stages tensors, as many at a time as it is let through."""

    def __init__(self) -> None:
        self.staged, self.go = 0, Event()
        self._lock = Lock()

    def __call__(self, tensor: Tensor) -> Tensor:
        with self._lock:
            self.staged += 1
        self.go.wait(10)
        return in_memory(tensor)


def test_every_tensor_comes_as_it_is_in_whatever_order_it_is_asked_for(directory: Path) -> None:
    checkpoint = ReadAhead(SafetensorsCheckpoint(directory), in_memory)
    checkpoint.expect([*NAMES, NAMES[0]])
    for number in (3, 0, 1, 2, *range(4, 12), 0, 5):  # one twice as announced, one again though it was not
        assert checkpoint.read(NAMES[number]).tolist() == [float(number)] * 100
    checkpoint.close()


def test_no_more_is_read_ahead_than_the_memory_allows(directory: Path) -> None:
    stage = Counting()
    checkpoint = ReadAhead(SafetensorsCheckpoint(directory), stage, most_bytes=3 * BYTES)
    checkpoint.expect(NAMES)
    stage.go.set()
    for number, name in enumerate(NAMES):
        assert stage.staged <= number + 3
        checkpoint.read(name)
    checkpoint.close()


def test_a_tensor_larger_than_that_memory_comes_alone(directory: Path) -> None:
    checkpoint = ReadAhead(SafetensorsCheckpoint(directory), in_memory, most_bytes=BYTES // 2)
    checkpoint.expect(NAMES)
    assert [float(checkpoint.read(name)[0]) for name in NAMES] == list(range(12))
    checkpoint.close()


def test_what_cannot_be_read_raises_in_its_turn(directory: Path) -> None:
    class Broken(SafetensorsCheckpoint):
        def read(self, name: str) -> Tensor:
            if name == NAMES[4]:
                raise LoadError("cut off")
            return super().read(name)

    checkpoint = ReadAhead(Broken(directory), in_memory)
    checkpoint.expect(NAMES)
    for name in NAMES[:4]:
        checkpoint.read(name)
    with pytest.raises(LoadError, match="cut off"):
        checkpoint.read(NAMES[4])
    checkpoint.close()


def test_closing_in_the_middle_reads_nothing_more(directory: Path) -> None:
    stage = Counting()
    stage.go.set()
    checkpoint = ReadAhead(SafetensorsCheckpoint(directory), stage, most_bytes=2 * BYTES)
    checkpoint.expect(NAMES)
    checkpoint.read(NAMES[0])
    checkpoint.close()
    assert stage.staged <= 3
