"""What the CUDA driver does once its GPU has faulted, as a host sees it; tests/gpu/test_faults.py has the rest."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pie_core.contracts.forward import ForwardBatch, ProbeKind
from pie_core.errors import EngineLost, LoadError
from pie_core.testing.batches import Probe, Request, Sample, Stepper
from pie_plugins.drivers.cuda_native.driver import CudaNativeDriver
from pie_plugins.drivers.cuda_native.model_runner import ModelRunner
from pie_plugins.drivers.cuda_native.step_runner import PendingStep, StepRunner
from pie_plugins.drivers.cuda_native.timeline import timeline_of
from tests.plugins.drivers.cuda_native.machine import DEVICE, cuda_native
from tests.plugins.models.reference import tiny


@pytest.fixture
def driver(tmp_path: Path) -> CudaNativeDriver:
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3")))
    loaded = cuda_native(tmp_path, random_weights=True)
    assert isinstance(loaded, CudaNativeDriver)
    return loaded


def faulted(*_: object) -> None:
    raise RuntimeError("CUDA error: device-side assert triggered")


@contextmanager
def fault(driver: CudaNativeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Meanwhile all that asks the device raises."""
    _, _, timeline = driver.parts()
    with monkeypatch.context() as patched:
        patched.setattr(timeline, "is_lost", lambda: True)
        for asks in ("upload", "mark", "send"):
            patched.setattr(timeline, asks, faulted)
        patched.setattr(PendingStep, "result", faulted)
        yield


def asked(stepper: Stepper) -> ForwardBatch:
    context = stepper.context()
    stepper.make_room(context, 2)
    return stepper.build([Request(context, [1, 2], samples=[Sample()], probes=[Probe(ProbeKind.LOGITS)])])


def test_a_gpu_that_faulted_is_told_as_a_lost_engine_from_then_on(
    driver: CudaNativeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = Stepper(driver)
    with fault(driver, monkeypatch):
        first = driver.submit(asked(stepper))
        with pytest.raises(EngineLost, match=rf"faulted in or before step {first}.*device-side assert"):
            driver.collect(first)
    enqueued: list[object] = []
    monkeypatch.setattr(StepRunner, "enqueue", lambda *step: enqueued.append(step))
    again = driver.submit(asked(stepper))
    assert enqueued == []
    with pytest.raises(EngineLost, match=rf"faulted in or before step {first}"):
        driver.collect(again)
    with pytest.raises(EngineLost, match="nothing of this process"):
        driver.copy_pages(0, [0], [1])
    with pytest.raises(EngineLost, match="nothing of this process"):
        driver.export_pages(0, [0])
    assert driver.is_lost
    driver.close()
    driver.close()


def test_a_page_operation_that_meets_the_fault_tells_it(
    driver: CudaNativeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        fault(driver, monkeypatch),
        pytest.raises(EngineLost, match=r"before a page operation.*device-side assert"),
    ):
        driver.copy_pages(0, [0], [1])


@pytest.mark.parametrize("noticed_by", ["submit", "collect", "close"])
def test_nothing_of_a_lost_gpu_is_freed(
    driver: CudaNativeDriver, noticed_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open steps with what they fetch, recordings, pages, pinned memory: freeing one would end the process."""
    stepper = Stepper(driver)
    tickets = [driver.submit(asked(stepper)) for _ in range(2)]
    owned = [weakref.ref(each) for each in belongings(driver)]
    with fault(driver, monkeypatch):
        if noticed_by == "submit":
            driver.submit(asked(stepper))
        if noticed_by != "close":
            for ticket in tickets:
                with pytest.raises(EngineLost):
                    driver.collect(ticket)
        driver.close()
    del stepper, driver
    gc.collect()
    assert [each() for each in owned if each() is None] == []


def belongings(driver: CudaNativeDriver) -> list[object]:
    steps, caches, timeline = driver.parts()
    open_steps = [each for each in driver._open.values() if isinstance(each, PendingStep)]
    fetched = [each.values for step in open_steps for each in step.probes._downloads]
    assert len(fetched) == 2
    return [steps, steps._outcomes.mirror, steps.buckets, steps.prompts, *caches, timeline, *fetched]


def test_a_closed_driver_is_freed_where_nothing_was_lost(driver: CudaNativeDriver) -> None:
    """Or the test above could not fail."""
    stepper = Stepper(driver)
    for _ in range(2):
        driver.submit(asked(stepper))
    owned = [weakref.ref(each) for each in belongings(driver)]
    driver.close()
    del stepper, driver
    gc.collect()
    assert [each() for each in owned[:-4]] == [None] * (len(owned) - 4)


def test_a_fault_while_a_model_is_loaded_is_told_and_frees_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3")))
    made: list[weakref.ref[ModelRunner]] = []
    init = ModelRunner.__init__

    def noted(self: ModelRunner, *parts: object) -> None:
        init(self, *parts)  # type: ignore[arg-type]
        made.append(weakref.ref(self))

    monkeypatch.setattr(ModelRunner, "__init__", noted)
    monkeypatch.setattr(ModelRunner, "answer", faulted)
    monkeypatch.setattr(type(timeline_of(torch.device(DEVICE))), "is_lost", lambda _: True)
    with pytest.raises(LoadError, match=r"faulted while the model was loaded: .*device-side assert"):
        cuda_native(tmp_path, random_weights=True)
    gc.collect()
    assert made[0]() is not None


TO_THE_END = """
import sys
from pie_plugins.drivers.cuda_native.lost_device import keep_until_exit

class Told:
    def __init__(self, name): self.name = name
    def __del__(self): print("freed", self.name)

one, other = Told("one"), [Told("other")]
if sys.argv[1] == "lost":
    keep_until_exit(one)
    keep_until_exit(other)
"""


@pytest.mark.parametrize(("fate", "freed"), [("well", ["freed one", "freed other"]), ("lost", [])])
def test_what_was_lost_is_not_freed_when_the_interpreter_ends_either(fate: str, freed: list[str]) -> None:
    command = [sys.executable, "-c", TO_THE_END, fate]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert sorted(ended.stdout.splitlines()) == freed
