"""What is compiled in advance is what loading and serving launch; parts of loading are timed; one rank goes first."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from socket import socket
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from pie_core.contracts.driver import DriverRequest, Progress
from pie_core.contracts.forward import ProbeKind
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import FromTicket, Mask, Probe, Request, Sample, Stepper
from pie_plugins.drivers.cuda_native import load_times
from pie_plugins.drivers.cuda_native.load_times import LoadTimes
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from pie_plugins.drivers.cuda_native.parallel import join, leave
from tests.plugins.drivers.cuda_native.both_kernels import needs_triton
from tests.plugins.drivers.cuda_native.machine import DEVICE, cuda_native
from tests.plugins.models.reference import ARCHITECTURES, tiny, tiny_moe

if find_spec("triton"):
    from pie_plugins.drivers.cuda_native import (
        decode_attention,
        fused_sampling,
        invariant_linear,
        listed_attention,
        triton_kernels,
        triton_launches,
        tuned_linear,
    )
    from pie_plugins.drivers.cuda_native.compilation import variant
    from pie_plugins.drivers.cuda_native.rehearsal import Rehearsal

    LAUNCHING = (
        decode_attention,
        fused_sampling,
        invariant_linear,
        listed_attention,
        triton_kernels,
        tuned_linear,
    )

CHOSEN: dict[str, Any] = {
    "kernels": "triton",
    "max_batch_requests": 4,
    "graph_rows": 32,
    "max_batch_tokens": 64,
}
DRAWN = Sample(temperature=1.0, top_p=0.8, stream=7)
Variants = dict[Hashable, str]


@cache
def checkpoint(name: str) -> Path:
    folder = Path(mkdtemp())
    config = tiny_moe() if name == "qwen3_moe" else tiny(name)
    write_checkpoint(folder, ARCHITECTURES[name], config)
    return folder


def rehearsed(path: Path, size: int = 1, **options: Any) -> Variants:
    chosen = CudaNativeOptions(**{"dtype": "float32", "total_pages": 512, **CHOSEN, **options})
    request = DriverRequest(path, DEVICE, chosen, ARCHITECTURES, {})
    found: Variants = {}

    def told(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        found[variant(kernel, arguments, constants)] = kernel.__name__

    with triton_launches.rehearsing(told, torch.device(DEVICE)):
        Rehearsal(request, chosen, torch.device(DEVICE), size).launch_all()
    return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Variants:
    """What really runs."""
    found: Variants = {}
    launch: Callable[..., None] = triton_launches.launch

    def noting(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        found[variant(kernel, arguments, constants)] = kernel.__name__
        launch(kernel, grid, *arguments, **constants)

    for module in LAUNCHING:
        monkeypatch.setattr(module, "launch", noting)
    return found


def serve(stepper: Stepper) -> None:
    """Prompts, then decoding at the border of every bucket."""
    contexts = [stepper.context() for _ in range(4)]
    for count in (1, 4):
        requests = [Request(each, list(range(3, 9)), samples=[Sample()]) for each in contexts[:count]]
        ticket = stepper.submit(requests)
        for size in (count, 1):
            following = [
                Request(contexts[row], [FromTicket(ticket, row)], samples=[DRAWN]) for row in range(size)
            ]
            ticket = stepper.submit(following)
        stepper.collect(ticket)


def serve_what_is_rare(stepper: Stepper) -> None:
    """Steps that no recording is there for."""
    one, other = stepper.context(), stepper.context()
    long, row, penal = [7] * 45, [7], Sample(temperature=0.7, repetition=1.2, presence=0.1)
    hidden = [Mask(0, [(0, 1)])]
    drafts = Request(one, [5, 6, 7], samples=[Sample()] * 3, drafts=2)
    for requests in (
        [Request(one, row, samples=[Sample()]), Request(other, long, samples=[Sample()])],
        [drafts],
        [drafts, Request(other, long, samples=[Sample()])],
        [Request(one, row, samples=[penal]), Request(other, row, samples=[DRAWN] * 3)],
        [Request(each, row, samples=[Sample()], masks=hidden) for each in (one, other)],
        [Request(one, row, samples=[Sample()]), Request(other, long, samples=[Sample()], masks=hidden)],
        [Request(one, long, probes=[Probe(ProbeKind.LOGITS)])],
    ):
        stepper.run(requests)


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows that only fill a block hold what lay in memory
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe"])
def test_every_kernel_that_is_launched_was_rehearsed(name: str, launched: Variants) -> None:
    known = rehearsed(checkpoint(name))
    launched.clear()
    driver = cuda_native(checkpoint(name), **CHOSEN)
    serve(Stepper(driver))
    serve_what_is_rare(Stepper(driver))
    driver.close()
    assert {"decode_kernel", "finish_kernel", "attend_items_kernel"} <= set(launched.values())
    assert {name for key, name in launched.items() if key not in known} == set()


@needs_triton
def test_a_rank_rehearses_its_share_without_the_others() -> None:
    whole, share = rehearsed(checkpoint("llama")), rehearsed(checkpoint("llama"), size=2)
    assert set(whole.values()) == set(share.values())


@needs_triton
def test_numbers_of_rows_and_parts_are_no_variants_of_their_own() -> None:
    """More buckets and longer steps: the same kernels, but for the parts that a merge takes side by side, and the few
    tilings of decode attention."""
    few, many = (
        rehearsed(checkpoint("qwen3"), max_batch_requests=requests, max_batch_tokens=tokens)
        for requests, tokens in ((4, 64), (64, 512))
    )
    assert {name for key, name in many.items() if key not in few} <= {
        "merge_kernel",
        "decode_kernel",
        "list_tiles_kernel",
    }


@needs_triton
def test_a_batch_invariant_model_is_rehearsed_with_the_products_it_takes() -> None:
    assert "product_kernel" in rehearsed(checkpoint("qwen3"), batch_invariant=True).values()


def test_parts_of_loading_last_until_the_next_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 3.5, 7.0, 7.5])
    monkeypatch.setattr(load_times, "perf_counter", lambda: next(clock))
    passed: list[Progress] = []
    times = LoadTimes(passed.append)
    for label in ("weights", "weights", "graphs", "weights"):
        times(Progress(label, 0, 0))
    assert times.seconds() == {"beginning": 1.0, "weights": 2.0 + 0.5 + 0.5, "graphs": 3.5}
    assert [each.label for each in passed] == ["weights", "weights", "graphs", "weights"]


def write_in_turn(rank: int, port: int, file: Path) -> None:
    """One rank, in a process of its own."""
    ranks = join(rank, 2, port, torch.device("cpu"))

    def work() -> None:
        seen = file.read_text() if file.exists() else ""
        file.write_text(f"{seen}{rank}")

    ranks.first_before_others(work)
    ranks.first_s(None)
    leave()


@pytest.mark.slow
def test_the_first_rank_is_done_before_the_others_begin(tmp_path: Path) -> None:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path / "order"
    others = [get_context("spawn").Process(target=write_in_turn, args=(rank, port, file)) for rank in (1, 0)]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0]
    assert file.read_text() == "01"
