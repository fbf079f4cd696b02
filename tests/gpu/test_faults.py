"""What the CUDA driver does when the GPU refuses: no memory at start or later, kernels that fail, a GPU that faults.

Needs one NVIDIA GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ProbeKind
from pie_core.errors import ForwardError, LoadError
from pie_core.testing.any_architecture import WEIGHTS, write_checkpoint
from pie_core.testing.batches import FromTicket, Probe, Request, Sample, Stepper
from tests.gpu.small_model import SMALL, small
from tests.plugins.models.reference import ARCHITECTURES, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PROMPT = [(17 * place) % 4000 for place in range(1500)]
MIB = 2**20


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3", **SMALL)))
    return tmp_path


def loaded(path: Path, **options: Any) -> Driver:
    return small(path, random_weights=True, **options)


@contextmanager
def memory_left(mib: int) -> Iterator[None]:
    """Torch gives this process so much more than it has, and no more: what others have on the GPU is left alone."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mib * MIB) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_model_that_does_not_fit_is_refused_with_what_to_lower(configuration: Path) -> None:
    with memory_left(16), pytest.raises(LoadError, match=r"too little memory.*gpu_mem_utilization"):
        loaded(configuration)
    loaded(configuration).close()


def test_a_share_without_room_for_pages_is_refused_with_the_sum(configuration: Path) -> None:
    with pytest.raises(LoadError, match=r"no room for KV pages.*weights take"):
        loaded(configuration, total_pages=0, gpu_mem_utilization=0.001)


def test_a_step_without_memory_fails_alone_and_replayed_ones_go_on(configuration: Path) -> None:
    stepper = Stepper(loaded(configuration))
    prompt = Request(stepper.context(), PROMPT, samples=[Sample()])
    expected = stepper.run([prompt]).tokens.tolist()
    one, two = stepper.context(), stepper.context()
    stepper.run([Request(one, [1, 2]), Request(two, [1, 2])])
    decoded = stepper.run([Request(stepper.fork(one), [3], samples=[Sample()])]).tokens.tolist()
    large = [Probe(ProbeKind.LOGITS, row) for row in range(len(PROMPT))]
    with memory_left(8):
        wide = stepper.context()
        stepper.make_room(wide, len(PROMPT))
        ticket = stepper.driver.submit(stepper.build([Request(wide, PROMPT, probes=large)]))
        with pytest.raises(ForwardError, match=r"no memory on the GPU.*max_batch_tokens"):
            stepper.driver.collect(ticket)
        assert stepper.run([Request(one, [3], samples=[Sample()])]).tokens.tolist() == decoded
    again = Request(stepper.context(), PROMPT, samples=[Sample()])
    assert stepper.run([again]).tokens.tolist() == expected
    stepper.driver.close()


def test_a_kernel_that_cannot_be_built_fails_its_step_alone(
    configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pie_plugins.drivers.cuda_native import triton_kernels  # imports triton

    stepper = Stepper(loaded(configuration, cuda_graphs=False, graph_rows=0))
    expected = stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])]).tokens.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(triton_kernels, "LANES", 2**22)  # more than Triton allows
        context = stepper.context()
        stepper.make_room(context, 2)
        ticket = stepper.driver.submit(stepper.build([Request(context, [1, 2], samples=[Sample()])]))
    with pytest.raises(ForwardError, match=rf"step {ticket} failed: \w+"):
        stepper.driver.collect(ticket)
    assert stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])]).tokens.tolist() == expected
    stepper.driver.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_logits_that_are_not_numbers_fail_their_request_and_what_hangs_on_it(
    tmp_path: Path, graphs: bool
) -> None:
    """One token's embedding is poisoned: its request fails, replayed or not, and the one beside it draws as ever."""
    write_checkpoint(tmp_path, ARCHITECTURES["qwen3"], tiny("qwen3", **SMALL))
    weights = load_file(tmp_path / WEIGHTS)
    weights["model.embed_tokens.weight"][7] = np.nan
    save_file(weights, tmp_path / WEIGHTS)
    stepper = Stepper(small(tmp_path, cuda_graphs=graphs, dtype="float32"))
    bad, good = stepper.context(), stepper.context()
    stepper.run([Request(bad, [1, 2, 3]), Request(good, [1, 2, 3])])
    for sample in (Sample(), Sample(temperature=0.8, top_p=0.9), Sample(temperature=1.0, top_k=20)):
        one, two = stepper.fork(bad), stepper.fork(good)
        expected = stepper.run([Request(stepper.fork(good), [4], samples=[sample])]).tokens.tolist()
        first = stepper.submit([Request(one, [7], samples=[sample]), Request(two, [4], samples=[sample])])
        second = stepper.submit([Request(one, [FromTicket(first, 0)], samples=[sample])])
        result = stepper.collect(first)
        assert result.failed == {0: "the logits are not numbers"}
        if sample.temperature == 0:
            assert result.tokens.tolist()[1:] == expected
        assert 0 in stepper.collect(second).failed
    stepper.driver.close()


FAULT = """
import sys
from pathlib import Path
import torch
from pie_core.contracts.forward import ProbeKind
from pie_core.errors import EngineLost
from pie_core.testing.batches import Probe, Request, Sample, Stepper
from tests.gpu.small_model import small

noticed_by, graphs = sys.argv[2], sys.argv[3] == "graphs"
driver = small(Path(sys.argv[1]), random_weights=True, cuda_graphs=graphs, graph_rows=64 if graphs else 0, host_pages=8)
stepper = Stepper(driver)
stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])])
_, _, timeline = driver.parts()

def submitted():
    context = stepper.context()
    stepper.make_room(context, 2)
    asked = Request(context, [1, 2], samples=[Sample()], probes=[Probe(ProbeKind.LOGITS)])
    return driver.submit(stepper.build([asked]))

def telling(call, *arguments):
    try:
        call(*arguments)
    except EngineLost as error:
        print("lost:", error)

open_steps = [submitted(), submitted()]
with timeline.main():
    torch._assert_async(torch.zeros(1, device="cuda"))
if noticed_by == "steps":
    for step in range(3):
        open_steps.append(submitted())
    for ticket in open_steps[2:]:
        telling(driver.collect, ticket)
elif noticed_by == "pages":
    for step in range(3):
        telling(driver.swap_out, 0, [0, 1], [0, 1])
        telling(driver.copy_pages, 0, [0], [1])
driver.close()
print("closed")
"""


@pytest.mark.parametrize("graphs", ["graphs", "eager"])
@pytest.mark.parametrize(("noticed_by", "least"), [("steps", 3), ("pages", 5), ("close", 0)])
def test_a_gpu_that_faults_is_told_as_a_lost_engine_and_the_process_ends_well(
    configuration: Path, noticed_by: str, least: int, graphs: str
) -> None:
    """In a process of its own: nothing in it can use the GPU again, and freeing pinned memory would abort it."""
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", FAULT, str(configuration), noticed_by, graphs],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "terminate called" not in run.stderr
    lines = run.stdout.splitlines()
    lost = [line for line in lines if line.startswith("lost:")]
    assert len(lost) >= least, run.stdout
    assert all("the GPU faulted in or before" in line for line in lost)
    assert "closed" in lines
