"""What the CUDA driver does once its GPU has faulted, as a host sees it; tests/gpu/test_faults.py has the rest."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import torch

from pie_core.contracts.forward import ForwardBatch, ProbeKind
from pie_core.errors import EngineLost, LoadError
from pie_core.testing.batches import Probe, Request, Sample, Stepper
from pie_plugins.drivers.cuda_native.driver import CudaNativeDriver
from pie_plugins.drivers.cuda_native.framing import write_call
from pie_plugins.drivers.cuda_native.loading import _described
from pie_plugins.drivers.cuda_native.model_runner import ModelRunner
from pie_plugins.drivers.cuda_native.step_runner import PendingStep, StepRunner
from pie_plugins.drivers.cuda_native.timeline import timeline_of
from tests.plugins.drivers.cuda_native.machine import DEVICE, cuda_native
from tests.plugins.models.reference import ARCHITECTURES, tiny


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


RANKS = """
import sys
from pathlib import Path
from pie_core.errors import EngineLost
from pie_core.testing.batches import Request, Sample, Stepper
from pie_plugins.drivers.cuda_native import parallel_driver
from tests.plugins.drivers.cuda_native.machine import cuda_native

parallel_driver.LEAVE_S = 0.5
driver = cuda_native(Path(sys.argv[1]), random_weights=True, tensor_parallel=2)
stepper = Stepper(driver)
stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])])
steps, _, timeline = driver.parts()

def faulted(*_):
    raise RuntimeError("CUDA error: device-side assert triggered")

timeline.is_lost = lambda: True
steps.enqueue = faulted
for _ in range(2):
    try:
        stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])])
    except EngineLost as error:
        print("lost:", error)
driver.close()
print("closed")
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="pretends on a CPU what tests/gpu/test_faults.py sees")
def test_ranks_end_when_one_has_lost_its_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3")))
    command = [sys.executable, "-c", RANKS, str(tmp_path)]
    root = Path(__file__).parents[4]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    first, second, last = ran.stdout.splitlines()
    assert "the GPU faulted in or before step" in first
    assert second.startswith("lost: driver cuda_native: ")
    assert last == "closed"


HANGING = """
from threading import Event
from pie_plugins.drivers.cuda_native import worker
worker.LEAVE_S = 0.2
worker.CudaNativeDriver.close = lambda driver: Event().wait()
worker.main()
"""


def test_a_rank_ends_though_what_it_queued_never_does(tmp_path: Path) -> None:
    """Rank 0 was killed, say: sums wait for it for ever, and the GPU is wanted by the next process."""
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3")))
    options = {"random_weights": True, "total_pages": 64, "graph_rows": 0, "max_batch_requests": 4}
    setup = {"rank": 0, "size": 1, "port": 0, "device": DEVICE, "path": str(tmp_path), "swap_bytes": 0}
    declared = _described(ARCHITECTURES["qwen3"])
    call = BytesIO()
    write_call(call, "load", setup | {"options": options, "architectures": [declared]})
    command, root = [sys.executable, "-c", HANGING], Path(__file__).parents[4]
    ran = subprocess.run(
        command, input=call.getvalue(), capture_output=True, cwd=root, timeout=100, check=False
    )
    assert ran.returncode == 1, ran.stderr
    assert b"its steps wait for a rank that is gone" in ran.stderr
