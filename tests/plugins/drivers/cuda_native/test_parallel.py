"""Two ranks that share a model give what one gives: in processes of their own, over gloo where there is no GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from socket import socket
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ProbeKind
from pie_core.errors import EngineLost, LoadError
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import FromTicket, Probe, Request, Sample, Stepper, build_batch, probe_values
from pie_plugins.drivers.cuda_native import loading, parallel_driver
from pie_plugins.drivers.cuda_native.framing import read_call, write_call
from pie_plugins.drivers.cuda_native.parallel import Ranks, share_of_config, share_of_weights
from pie_plugins.drivers.cuda_native.parallel_driver import ParallelDriver, Worker
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.qwen3 import Qwen3
from tests.plugins.drivers.cuda_native.both_kernels import needs_triton
from tests.plugins.drivers.cuda_native.machine import DEVICE, cuda_native
from tests.plugins.models.reference import ARCHITECTURES, tiny

pytestmark = pytest.mark.slow

ALONE = "PIE_TEST_ALONE"

needs_devices = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs, or none"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases everywhere, so that one added twice would show."""
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, ARCHITECTURES["llama"], tiny("llama", attention_bias=True, mlp_bias=True))
    return folder


def runs_here(request: pytest.FixtureRequest) -> bool:
    """On GPUs a loss stays with the process, so whatever loses a rank runs in a process of its own."""
    if DEVICE == "cpu" or ALONE in os.environ:
        return True
    name = f"{Path(__file__)}::{request.node.name}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
        env={**kept, ALONE: "1"},  # whoever runs this one may be one of several workers
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in run.stdout, run.stdout + run.stderr
    return False


def two_and_the_other(checkpoint: Path) -> tuple[ParallelDriver, subprocess.Popen[bytes]]:
    """A driver over two ranks, and the process of rank 1."""
    driver = cuda_native(checkpoint, tensor_parallel=2)
    assert isinstance(driver, ParallelDriver)
    (worker,) = driver._workers
    return driver, worker._process


@pytest.fixture
def two(checkpoint: Path) -> Iterator[Driver]:
    driver = cuda_native(checkpoint, tensor_parallel=2, host_pages=8)
    yield driver
    driver.close()


def told(driver: Driver) -> list[Any]:
    """A story with everything that moves: prompts, queued steps, a fork, swapped and imported pages."""
    stepper = Stepper(driver)
    one, other = stepper.context(), stepper.context()
    first = stepper.run(
        [
            Request(one, list(range(3, 40)), samples=[Sample()], probes=[Probe(ProbeKind.LOGITS)]),
            Request(other, [9, 8, 7], samples=[Sample(temperature=1.0, stream=5)]),
        ]
    )
    ticket = stepper.submit([Request(one, [5], samples=[Sample()]), Request(other, [6], samples=[Sample()])])
    behind = stepper.submit([Request(one, [FromTicket(ticket, 0)], samples=[Sample()])])
    found = [
        probe_values(first, 0),
        first.tokens,
        stepper.collect(ticket).tokens,
        stepper.collect(behind).tokens,
    ]
    pages = list(one.pages[0].values())
    driver.swap_out(0, pages, range(len(pages)))
    spare = [stepper.book.take(0) for _ in pages]
    driver.swap_in(0, range(len(pages)), spare)
    again = [stepper.book.take(0) for _ in pages]
    driver.import_pages(0, again, driver.export_pages(0, spare))
    one.pages[0] = dict(zip(one.pages[0], again, strict=True))
    fork = stepper.fork(one)
    last = stepper.run([Request(fork, [4], samples=[Sample()], probes=[Probe(ProbeKind.LOGITS)])])
    return [*found, probe_values(last, 0), last.tokens]


@needs_devices
def test_two_ranks_tell_the_story_of_one(two: Driver, checkpoint: Path) -> None:
    alone = cuda_native(checkpoint, host_pages=8)
    for seen, expected in zip(told(two), told(alone), strict=True):
        if seen.dtype == np.int32:
            assert seen.tolist() == expected.tolist()
        else:
            assert np.abs(seen - expected).max() <= 1e-5 * expected.std()
    assert two.capabilities.cache[0].group == alone.capabilities.cache[0].group


@needs_devices
def test_a_second_model_over_several_devices_is_refused_and_the_first_goes_on(
    two: Driver, checkpoint: Path
) -> None:
    with pytest.raises(LoadError, match="start another process"):
        cuda_native(checkpoint, tensor_parallel=2)
    stepper = Stepper(two)
    assert len(stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])]).tokens) == 1


@needs_devices
def test_ranks_leave_each_other_in_peace(checkpoint: Path, request: pytest.FixtureRequest) -> None:
    if not runs_here(request):
        return
    two, process = two_and_the_other(checkpoint)
    stepper = Stepper(two)
    stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])])
    two.close()
    assert process.returncode == 0


@needs_devices
def test_closing_does_not_wait_for_a_rank_that_stands_still(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not runs_here(request):
        return
    two, process = two_and_the_other(checkpoint)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(parallel_driver, "LEAVE_S", 0.5)
    two.close()
    assert process.returncode == -signal.SIGKILL


@needs_devices
def test_a_rank_that_dies_ends_steps_by_type_and_closing_works(
    checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    if not runs_here(request):
        return
    two, process = two_and_the_other(checkpoint)
    process.kill()
    process.wait()
    stepper = Stepper(two)
    with pytest.raises(EngineLost, match="rank 1 has ended"):
        stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])])
    two.close()


@needs_devices
def test_a_rank_that_dies_while_a_step_waits_for_it_ends_the_step_by_type(
    checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    """Stopped first, so that the step is queued here and not there."""
    if not runs_here(request):
        return
    two, process = two_and_the_other(checkpoint)
    stepper = Stepper(two)
    stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])])
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.3, process.kill).start()
    ticket = stepper.submit([Request(stepper.context(), [1, 2], samples=[Sample()])])
    while not two.is_done(ticket):
        sleep(0.01)
    with pytest.raises(EngineLost, match=f"rank 1 has ended, which step {ticket} needs"):
        two.collect(ticket)
    with pytest.raises(EngineLost):
        two.submit(stepper.build([Request(stepper.context(), [1, 2], samples=[Sample()])]))
    two.close()


@needs_devices
def test_a_rank_that_dies_while_the_model_is_loaded_ends_loading(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """It dies when all have their weights, and rank 0 asks for how many pages all have room."""
    if not runs_here(request):
        return
    started: list[Worker] = []

    class Known(Worker):
        def __init__(self, *what: Any) -> None:
            super().__init__(*what)
            started.append(self)

    def least(ranks: Ranks, value: int, device: torch.device) -> int:
        started[0]._process.kill()
        return asked(ranks, value, device)

    asked = Ranks.least
    monkeypatch.setattr(loading, "Worker", Known)
    monkeypatch.setattr(Ranks, "least", least)
    with pytest.raises(LoadError, match="rank 1 ended with exit code -9"):
        cuda_native(checkpoint, tensor_parallel=2)


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused() -> None:
    config = Qwen3().config(tiny("qwen3"), "here")
    with pytest.raises(LoadError, match="tensor_parallel is 3, which does not divide num_attention_heads"):
        share_of_config(config, Ranks(0, 3))


def test_shares_of_the_weights_add_up_to_the_whole() -> None:
    architecture = Qwen3()
    config = architecture.read(ConfigKeys(tiny("qwen3"), "here"))
    table = architecture.weights(config)
    whole = {
        target: torch.randn(sum(source.shape[0] for source in entry.sources), *entry.sources[0].shape[1:])
        for entry in table.entries
        for target in entry.targets
    }
    shares = [share_of_weights(table, whole, Ranks(rank, 2)) for rank in range(2)]
    x = torch.randn(3, config.num_attention_heads * config.head_dim)
    name = "layers.0.output.weight"
    parts = [part @ share[name].T for part, share in zip(x.chunk(2, dim=1), shares, strict=True)]
    assert torch.allclose(parts[0] + parts[1], x @ whole[name].T, atol=1e-4)
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = whole["layers.1.qkv.weight"].split([heads * config.head_dim for heads in sizes])
    second = torch.cat([part.chunk(2)[1] for part in (q, k, v)])
    assert torch.equal(shares[1]["layers.1.qkv.weight"], second)
    assert torch.equal(shares[1]["embedding"], whole["embedding"])


def test_a_batch_comes_out_of_the_pipe_as_it_went_in(checkpoint: Path, tmp_path: Path) -> None:
    driver = cuda_native(checkpoint)
    stepper = Stepper(driver)
    request = Request(stepper.context(), [1, 2], samples=[Sample(allowed=[3], bias=[(1, 2.0)], history=[4])])
    batch = build_batch([request], driver.capabilities)
    with (tmp_path / "pipe").open("wb") as pipe:
        write_call(pipe, "submit", batch, [1, 2])
    written = (tmp_path / "pipe").read_bytes()
    for size in (3, 8, 100, len(written) - 1):  # whoever wrote it has ended meanwhile
        assert read_call(BytesIO(written[:size])) is None
    with (tmp_path / "pipe").open("rb") as pipe:
        call = read_call(pipe)
        assert read_call(pipe) is None
    assert call is not None
    name, (found, listed) = call
    assert (name, listed) == ("submit", [1, 2])
    assert repr(found) == repr(batch)
    assert found.samplers.stream.dtype == np.uint64


CHOOSING = """
import sys, torch
from pie_plugins.drivers.cuda_native.parallel import join, leave
from pie_plugins.drivers.cuda_native.tuned_linear import Choice, Cut
rank, port = int(sys.argv[1]), int(sys.argv[2])
ranks = join(rank, 2, port, torch.device("cpu"))
print(ranks.first_s({Choice(64, 128, False, 16): Cut(64, 64 * (1 + rank))}))
leave()
"""


@needs_triton
def test_every_rank_multiplies_as_the_first_found_best() -> None:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CHOOSING, str(rank), str(port)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert "inputs=64," in told[0]
    assert told[0] == told[1]
