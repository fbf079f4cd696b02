"""What only a GPU can show of the CUDA driver: nothing waits while steps are queued, bf16, FlashInfer.

Needs one NVIDIA GPU. The driver's other tests run on it too, where there is one.
"""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu_loop import Story, run
from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32, ProbeKind, last_accepted
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import FromTicket, Mask, Probe, Request, Sample, Stepper, Token, probe_values
from tests.gpu.small_model import SMALL, small
from tests.plugins.models.reference import ARCHITECTURES, tiny, transformers_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    write_checkpoint(folder, ARCHITECTURES["qwen3"], tiny("qwen3", **SMALL))
    return folder


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Anything that waits for the device raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def answers(driver: Driver, prompt: list[int]) -> list[Float32]:
    """Logits of a whole prompt's last row, and of a row decoded behind it."""
    stepper = Stepper(driver)
    context = stepper.context()
    probes = [Probe(ProbeKind.LOGITS)]
    found = [probe_values(stepper.run([Request(context, prompt, probes=probes, samples=[Sample()])]), 0)]
    found.append(probe_values(stepper.run([Request(context, [7], probes=probes, samples=[Sample()])]), 0))
    driver.close()
    return found


def relative_error(found: Float32, expected: Float32) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


PROMPT = [(17 * place) % 4000 for place in range(300)]


def test_nothing_waits_while_steps_are_queued(checkpoint: Path) -> None:
    """Prompts, replayed steps, changed logits, drafts behind open steps: only collecting waits."""
    stepper = Stepper(small(checkpoint))
    one, two = stepper.context(), stepper.context()
    stepper.run([Request(one, PROMPT, samples=[Sample()]), Request(two, [1, 2, 3], samples=[Sample()])])
    with waiting_is_an_error():
        tickets = [
            stepper.submit([Request(one, [5], samples=[Sample()]), Request(two, [6], samples=[Sample()])])
        ]
        seen = [FromTicket(tickets[0], 0)]
        drawn = Sample(temperature=1.0, top_p=0.9, presence=1.0, history=seen, allowed=range(99))
        tickets.append(stepper.submit([Request(one, seen, samples=[drawn])]))
        drafted: list[Token] = [FromTicket(tickets[0], 1), 8, 9]
        samples = [Sample(row) for row in range(3)]
        tickets.append(stepper.submit([Request(two, drafted, samples=samples, drafts=2)]))
        tickets.append(
            stepper.submit([Request(two, [FromTicket(tickets[2], last_accepted(0))], samples=[Sample()])])
        )
    assert not any(stepper.collect(ticket).failed for ticket in tickets)


@pytest.mark.parametrize("graphs", [False, True])
def test_bfloat16_logits_are_those_of_transformers(checkpoint: Path, graphs: bool) -> None:
    expected = transformers_logits(checkpoint, [*PROMPT, 7])
    found = answers(small(checkpoint, products="auto", cuda_graphs=graphs), PROMPT)
    assert relative_error(found[0], expected[len(PROMPT) - 1]) < 0.02
    assert relative_error(found[1], expected[len(PROMPT)]) < 0.02


def test_float32_logits_are_those_of_transformers(checkpoint: Path) -> None:
    expected = transformers_logits(checkpoint, [*PROMPT, 7])
    found = answers(small(checkpoint, dtype="float32"), PROMPT)
    assert relative_error(found[0], expected[len(PROMPT) - 1]) < 1e-4
    assert relative_error(found[1], expected[len(PROMPT)]) < 1e-4


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed")
def test_flashinfer_and_the_own_kernel_agree(checkpoint: Path) -> None:
    found, expected = (answers(small(checkpoint, attention=name), PROMPT) for name in ("flashinfer", "own"))
    assert relative_error(found[0], expected[0]) < 0.02
    assert relative_error(found[1], expected[1]) < 0.02


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="flashinfer is not installed")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flashinfer_s_prompts_equal_the_own_kernel_s(tmp_path: Path, head_dim: int) -> None:
    """Eager: both of FlashInfer's generations of kernels read queries where they lie."""
    write_checkpoint(tmp_path, ARCHITECTURES["qwen3"], tiny("qwen3", **(SMALL | {"head_dim": head_dim})))
    found, expected = (
        answers(small(tmp_path, attention=name, graph_rows=0), PROMPT) for name in ("flashinfer", "own")
    )
    assert relative_error(found[0], expected[0]) < 0.02
    assert relative_error(found[1], expected[1]) < 0.02


def test_a_replayed_prompt_gives_the_logits_of_an_eager_one(checkpoint: Path) -> None:
    """In float32, where nothing but the order of sums differs."""
    found, expected = (
        answers(small(checkpoint, dtype="float32", graph_rows=rows), PROMPT) for rows in (512, 0)
    )
    assert relative_error(found[0], expected[0]) < 1e-4
    assert relative_error(found[1], expected[1]) < 1e-4


@pytest.mark.parametrize("products", ["auto", "library"])
def test_own_products_and_the_library_s_agree(checkpoint: Path, products: str) -> None:
    expected = answers(small(checkpoint, dtype="float32", products="library"), PROMPT)
    found = answers(small(checkpoint, dtype="float32", products=products), PROMPT)
    assert relative_error(found[1], expected[1]) < 1e-4


def test_a_batch_invariant_decode_has_the_same_bits_replayed_and_eager_in_any_company(
    checkpoint: Path,
) -> None:
    seen = []
    for graphs, others in ((False, 0), (True, 0), (True, 1), (True, 6), (False, 6)):
        driver = small(checkpoint, batch_invariant=True, cuda_graphs=graphs)
        stepper = Stepper(driver)
        context, company = stepper.context(), [stepper.context() for _ in range(others)]
        stepper.run([Request(context, PROMPT), *(Request(each, [3] * 40) for each in company)])
        probed = Request(context, [7], samples=[Sample()], probes=[Probe(ProbeKind.LOGITS)])
        rest = [Request(each, [3], samples=[Sample()]) for each in company]
        seen.append(probe_values(stepper.run([*rest, probed]), 0))
        driver.close()
    assert all(np.array_equal(each, seen[0]) for each in seen)


def told(driver: Driver, depth: int, others: int) -> list[int]:
    """What a context draws in 24 steps beside others of other lengths, one of them masked; `depth` steps are open when
    the next is queued, whose tokens are those that the last one is going to draw."""
    stepper = Stepper(driver)
    stories = [stepper.context() for _ in range(others + 1)]
    drawn = [Sample(temperature=1.0, top_p=0.95, stream=place) for place in range(others + 1)]
    prompts = [PROMPT, *([place + 2] * (1 + 7 * place % 20) for place in range(others))]
    requests = [
        Request(story, prompt, samples=[sample])
        for story, prompt, sample in zip(stories, prompts, drawn, strict=True)
    ]
    last = stepper.submit(requests[::-1])
    seen, tickets = [], [last]
    for _ in range(24):
        while len(tickets) > depth:
            seen.append(int(stepper.collect(tickets.pop(0)).tokens[others]))
        requests = [
            Request(story, [FromTicket(last, others - place)], samples=[drawn[place]])
            for place, story in enumerate(stories)
        ]
        if others:
            requests[1] = replace(requests[1], masks=[Mask(0, [(0, 1)])])
        last = stepper.submit(requests[::-1])
        tickets.append(last)
    seen += [int(stepper.collect(ticket).tokens[others]) for ticket in tickets]
    driver.close()
    return seen


def test_a_batch_invariant_story_is_one_whatever_is_open_and_whoever_is_near(checkpoint: Path) -> None:
    """Alone, among few, and among so many that products and attention take other tiles."""
    seen = [
        told(
            small(checkpoint, batch_invariant=True, cuda_graphs=graphs, max_batch_requests=80), depth, others
        )
        for graphs, depth, others in ((False, 0, 0), (True, 0, 0), (True, 3, 0), (True, 3, 9), (True, 0, 70))
    ]
    assert len(set(seen[0])) > 12
    assert all(each == seen[0] for each in seen)


def decoded_bits(driver: Driver) -> list[Float32]:
    """Logits of some contexts after as many steps as it takes to notice a kernel that ran too early."""
    stepper = Stepper(driver)
    contexts = [stepper.context() for _ in range(5)]
    stepper.run(
        [Request(context, PROMPT[place:], samples=[Sample()]) for place, context in enumerate(contexts)]
    )
    for _ in range(40):
        tickets = [
            stepper.submit([Request(each, [7], samples=[Sample()]) for each in contexts]) for _ in range(3)
        ]
        for ticket in tickets:
            stepper.collect(ticket)
    probes = [Probe(ProbeKind.LOGITS)]
    result = stepper.run([Request(each, [7], samples=[Sample()], probes=probes) for each in contexts])
    driver.close()
    return [probe_values(result, place) for place in range(len(contexts))]


@pytest.mark.parametrize("graphs", [False, True])
def test_kernels_that_begin_early_give_the_bits_of_those_that_wait(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    from pie_plugins.drivers.cuda_native import triton_launches  # imports triton

    early = decoded_bits(small(checkpoint, batch_invariant=True, cuda_graphs=graphs))
    monkeypatch.setattr(triton_launches, "HOPPER", (99, 0))
    triton_launches.overlapping_on.cache_clear()
    try:
        waiting = decoded_bits(small(checkpoint, batch_invariant=True, cuda_graphs=graphs))
    finally:
        triton_launches.overlapping_on.cache_clear()
    assert all(np.array_equal(*each) for each in zip(early, waiting, strict=True))


@pytest.mark.parametrize(
    ("rows", "held", "inputs", "shares"), [(1, 0, 512, 1), (5, 1, 256, 2), (32, 1, 128, 1)]
)
def test_products_that_hold_weights_wait_for_their_rows(
    monkeypatch: pytest.MonkeyPatch, rows: int, held: int, inputs: int, shares: int
) -> None:
    """Each of a chain of products in one graph reads what the one before it wrote."""
    from pie_plugins.drivers.cuda_native import triton_launches
    from pie_plugins.drivers.cuda_native.tuned_linear import Cut, TunedLinear

    linear, cut = TunedLinear(), Cut(8 if rows == 1 else 64, inputs, shares, stages=3, held=held)
    start = torch.randn(rows, 512, device="cuda").to(torch.bfloat16)
    weights = (torch.randn(16, 512, 512, device="cuda") / 512**0.5).to(torch.bfloat16)
    matrices = [linear.prepare(weight, None) for weight in weights]

    def chain() -> torch.Tensor:
        x = start
        for matrix in matrices:
            x = linear.multiply(x, matrix, cut)
        return x

    def replayed() -> list[torch.Tensor]:
        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            end = chain()
        seen = []
        for _ in range(20):
            end.zero_()
            graph.replay()
            seen.append(end.clone())
        return seen

    early = replayed()
    monkeypatch.setattr(triton_launches, "HOPPER", (99, 0))
    triton_launches.overlapping_on.cache_clear()
    try:
        waiting = replayed()
    finally:
        triton_launches.overlapping_on.cache_clear()
    assert waiting[0].isfinite().all()
    assert waiting[0].count_nonzero()
    assert all(torch.equal(each, waiting[0]) for each in early + waiting)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8])
def test_many_steps_queued_behind_each_other_end_well(tmp_path: Path, batch: int) -> None:
    """At, below and above a bucket's size."""
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3", **SMALL)))
    driver = small(tmp_path, random_weights=True)
    timed = run(driver, [Story(100 + place, 60 + 3 * place) for place in range(batch)], 0.7, depth=3)
    assert timed.tokens == sum(60 + 3 * place for place in range(batch))
    driver.close()


@pytest.mark.alone
@pytest.mark.skipif(
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1,
    reason="needs the GPU to itself: no other workers",
)
def test_pages_fill_the_share_of_the_memory_that_pie_may_use(tmp_path: Path) -> None:
    """And do so again for the next model of the same process."""
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3", **SMALL)))
    pages = []
    for _ in range(2):
        driver = small(tmp_path, random_weights=True, total_pages=0, gpu_mem_utilization=0.2)
        free, total = torch.cuda.mem_get_info()
        assert 0.14 * total < total - free < 0.22 * total
        pages.append(driver.capabilities.cache[0].num_pages)
        driver.close()
    assert pages[1] == pytest.approx(pages[0], rel=0.02)


def test_a_closed_driver_gives_its_memory_back_though_survivors_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3", **SMALL)))
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    driver = small(tmp_path, random_weights=True)
    held = torch.cuda.memory_allocated() - before
    gc.freeze()
    driver.close()
    assert torch.cuda.memory_allocated() - before < held / 10
    assert torch.cuda.memory_reserved() - reserved < held / 10
