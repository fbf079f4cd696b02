"""What the CUDA driver promises beyond the contract: graphs, batch invariance, faults that end one step, memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pie_core.contracts.driver import Driver, DriverRequest, Feature
from pie_core.contracts.forward import Float32, PrefixGroups, ProbeKind, last_accepted
from pie_core.errors import ForwardError, LoadError
from pie_core.ids import Ticket
from pie_core.testing.any_architecture import WEIGHTS, write_checkpoint
from pie_core.testing.batches import Context, FromTicket, Probe, Request, Sample, Stepper, probe_values
from pie_plugins.drivers.cuda_native import batch_tensors, cuda_graphs, pie_drivers
from pie_plugins.drivers.cuda_native.cuda_graphs import Bucket, bucket_sizes
from pie_plugins.drivers.cuda_native.driver import CudaNativeDriver
from pie_plugins.drivers.cuda_native.memory import GRAPH_RESERVE, MemoryUse, pages_that_fit
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from pie_plugins.drivers.cuda_native.prompt_graphs import ASKED, ROWS, up_to
from pie_plugins.drivers.cuda_native.shared_prefixes import plan_tiles
from pie_plugins.drivers.cuda_native.step_runner import Recorded, StepRunner
from tests.plugins.drivers.cuda_native.machine import DEVICE, cuda_native
from tests.plugins.models.reference import ARCHITECTURES, portable, tiny

GIB = 2**30


@cache
def checkpoint(architecture: str = "qwen3") -> Path:
    folder = Path(mkdtemp())
    write_checkpoint(folder, ARCHITECTURES[architecture], tiny(architecture))
    return folder


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the buckets that steps went through."""
    sizes: list[int] = []
    replay = StepRunner._replay

    def noting(self: StepRunner, recorded: Recorded, *arguments: Any) -> Any:
        if isinstance(recorded, Bucket):
            sizes.append(recorded.tensors.sizes.requests)
        return replay(self, recorded, *arguments)

    monkeypatch.setattr(StepRunner, "_replay", noting)
    return sizes


def started(stepper: Stepper, count: int, sample: Sample) -> list[tuple[Request, int]]:
    """Contexts with prompts of different lengths, ready to decode: a request each, and its first token."""
    contexts = [stepper.context() for _ in range(count)]
    prompts = [[(7 * place + 3 * row) % 300 for row in range(3 + 5 * place)] for place in range(count)]
    result = stepper.run(
        [
            Request(context, prompt, samples=[sample])
            for context, prompt in zip(contexts, prompts, strict=True)
        ]
    )
    return [
        (Request(context, [0]), int(token)) for context, token in zip(contexts, result.tokens, strict=True)
    ]


def decoded(stepper: Stepper, count: int, steps: int, sample: Sample, depth: int = 0) -> list[list[int]]:
    """The tokens of each step; with a depth, that many steps are queued before the first is collected."""
    ready = started(stepper, count, sample)
    tickets, found = [], []
    tokens: list[Any] = [token for _, token in ready]
    for _ in range(steps):
        ticket = stepper.submit(
            [
                Request(request.context, [token], samples=[sample])
                for (request, _), token in zip(ready, tokens, strict=True)
            ]
        )
        tickets.append(ticket)
        tokens = [FromTicket(ticket, row) for row in range(count)]
        if len(tickets) > depth:
            found.append(stepper.collect(tickets.pop(0)).tokens.tolist())
            if depth == 0:
                tokens = found[-1]
    return found + [stepper.collect(ticket).tokens.tolist() for ticket in tickets]


@pytest.mark.parametrize(
    "sample", [Sample(), Sample(temperature=1.0, stream=9, top_p=0.8)], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_replayed_steps_give_the_tokens_of_eager_ones(
    replayed: list[int], count: int, sample: Sample
) -> None:
    """Counts at, below and above a bucket's size, and steps queued behind open ones."""
    eager = decoded(Stepper(cuda_native(checkpoint(), cuda_graphs=False)), count, 6, sample)
    assert not replayed
    for depth in (0, 3):
        assert decoded(Stepper(cuda_native(checkpoint())), count, 6, sample, depth) == eager
    bucket = next(size for size in bucket_sizes(8) if size >= count)
    assert replayed == [bucket] * 12


def test_changed_logits_and_probes_leave_a_step_in_its_bucket(replayed: list[int]) -> None:
    tokens = {}
    for graphs in (False, True):
        stepper = Stepper(cuda_native(checkpoint(), cuda_graphs=graphs))
        (one, token), (two, other) = started(stepper, 2, Sample())
        step = stepper.run(
            [
                Request(
                    one.context, [token], samples=[Sample(presence=50.0, history=[token], bias=[(9, 3.0)])]
                ),
                Request(
                    two.context,
                    [other],
                    samples=[Sample(temperature=1.0, allowed=[5, 6])],
                    probes=[Probe(ProbeKind.ENTROPY)],
                ),
            ]
        )
        assert not step.failed
        tokens[graphs] = (*step.tokens.tolist(), round(float(step.probe_values[0]), 4))
    assert tokens[True] == tokens[False]
    assert replayed == [2]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("right", [0, 1, 3])
def test_steps_that_verify_drafts_are_replayed_where_that_is_asked_for(
    replayed: list[int], count: int, right: int
) -> None:
    """`right` of three drafts are what the model says; the next step is queued before that is known."""
    found = {}
    for graphs in (False, True):
        stepper = Stepper(cuda_native(checkpoint(), cuda_graphs=graphs, graph_drafts=3, kv_page_size=2))
        ready = started(stepper, count, Sample())
        wanted = [told(stepper, request.context, token) for request, token in ready]
        requests = []
        for (request, token), truth in zip(ready, wanted, strict=True):
            drafts = [each if place < right else (each + 1) % 300 for place, each in enumerate(truth[:3])]
            samples = [Sample(row) for row in range(4)]
            requests.append(Request(request.context, [token, *drafts], samples=samples, drafts=3))
        one = stepper.submit(requests)
        ends = [[FromTicket(one, last_accepted(place))] for place in range(count)]
        two = stepper.submit(
            [Request(each.context, end, samples=[Sample()]) for each, end in zip(requests, ends, strict=True)]
        )
        first, second = stepper.collect(one), stepper.collect(two)
        assert first.accepted.tolist() == [right] * count
        assert second.tokens.tolist() == [truth[right + 1] for truth in wanted]
        found[graphs] = first.tokens.tolist()
    assert found[True] == found[False]
    assert len(replayed) == 5 * count + 2


def told(stepper: Stepper, context: Context, token: int) -> list[int]:
    """What the model says next, told by a fork."""
    fork, tokens = stepper.fork(context), [token]
    for _ in range(5):
        tokens.append(int(stepper.run([Request(fork, tokens[-1:], samples=[Sample()])]).tokens[0]))
    stepper.book.drop_context(fork)
    return tokens[1:]


def test_steps_that_do_more_than_decode_do_not_go_through_the_buckets_of_decoding(
    replayed: list[int],
) -> None:
    stepper = Stepper(cuda_native(checkpoint()))
    context = stepper.context()
    stepper.run([Request(context, [1, 2, 3], samples=[Sample()])])
    stepper.run([Request(context, [4])])
    stepper.run([Request(context, [4], samples=[Sample(), Sample(temperature=1.0)])])
    assert replayed == []


def test_the_largest_bucket_is_the_limit_itself() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert bucket_sizes(256)[-2:] == (224, 256)


def last_logits(stepper: Stepper, requests: Sequence[Request]) -> list[Float32]:
    result = stepper.run(requests)
    return [probe_values(result, place) for place in range(len(requests))]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_batch_invariant_driver_gives_the_same_bits_in_any_company(graphs: bool) -> None:
    prompt, probes, samples = list(range(5, 42)), [Probe(ProbeKind.LOGITS)], [Sample()]
    seen = []
    for others in (0, 1, 5):
        stepper = Stepper(cuda_native(checkpoint(), batch_invariant=True, cuda_graphs=graphs))
        company = [stepper.context() for _ in range(others)]
        context = stepper.context()
        before = [Request(each, [3] * (place + 1), samples=samples) for place, each in enumerate(company)]
        stepper.run([*before, Request(context, prompt, samples=samples)])
        beside = [Request(each, [3], samples=samples) for each in company]
        requests = [*beside, Request(context, [7], samples=samples, probes=probes)]
        seen.append(probe_values(stepper.run(requests), 0))
    assert all(np.array_equal(each, seen[0]) for each in seen)


def test_logits_equal_the_portable_driver_s() -> None:
    prompt = list(range(40))
    seen = []
    for driver in (cuda_native(checkpoint()), portable(checkpoint())):
        stepper = Stepper(driver)
        context = stepper.context()
        stepper.run([Request(context, prompt)])
        seen += last_logits(stepper, [Request(context, [7], probes=[Probe(ProbeKind.LOGITS)])])
    assert np.abs(seen[0] - seen[1]).max() <= 1e-5 * seen[1].std()


def test_a_step_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = cuda_native(checkpoint(), graph_rows=0)
    stepper = Stepper(driver)
    expected = stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])]).tokens.tolist()
    with monkeypatch.context() as patched:
        patched.setattr(StepRunner, "_run_eagerly", _out_of_memory)
        ticket = driver.submit(stepper.build([Request(_roomy(stepper, 2), [1, 2], samples=[Sample()])]))
    behind = driver.submit(
        stepper.build([Request(_roomy(stepper, 1), [FromTicket(ticket, 0)], samples=[Sample()])])
    )
    with pytest.raises(ForwardError, match=r"no memory on the GPU.*max_batch_tokens"):
        driver.collect(ticket)
    assert "failed" in driver.collect(behind).failed[0]
    assert stepper.run([Request(stepper.context(), [1, 2], samples=[Sample()])]).tokens.tolist() == expected


def _out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _roomy(stepper: Stepper, rows: int) -> Any:
    context = stepper.context()
    stepper.make_room(context, rows)
    return context


def test_a_page_that_does_not_exist_fails_its_request_and_no_other() -> None:
    stepper = Stepper(cuda_native(checkpoint()))
    good, bad = stepper.context(), stepper.context()
    stepper.run([Request(good, [1, 2, 3]), Request(bad, [1, 2, 3])])
    expected = stepper.run([Request(stepper.fork(good), [4], samples=[Sample()])]).tokens.tolist()
    bad.pages[0][0] = 512
    result = stepper.run([Request(bad, [4], samples=[Sample()]), Request(good, [4], samples=[Sample()])])
    assert result.failed == {0: "page 512 does not exist; there are 512"}
    assert result.tokens.tolist()[1:] == expected


@pytest.mark.parametrize(
    ("token", "sample", "cause"),
    [
        (321, Sample(), "token id 321 is outside 0 … 319"),
        (1, Sample(history=[2, -7], repetition=1.2), "token -7 of the history is outside 0 … 319"),
        (FromTicket(Ticket(0), 3), Sample(), "ticket 0 has no sampler 3: 1 requests, 1 samplers"),
        (
            FromTicket(Ticket(9), 0),
            Sample(),
            "ticket 9 is not among the last steps of this driver, or failed",
        ),
    ],
)
def test_what_does_not_exist_is_named_in_the_failure_of_its_request(
    token: Any, sample: Sample, cause: str
) -> None:
    stepper = Stepper(cuda_native(checkpoint()))
    stepper.run([Request(stepper.context(), [1], samples=[Sample()])])
    assert stepper.run([Request(stepper.context(), [token], samples=[sample])]).failed == {0: cause}


def test_weights_that_are_not_numbers_fail_requests_and_what_hangs_on_them() -> None:
    folder = Path(mkdtemp())
    write_checkpoint(folder, ARCHITECTURES["llama"], tiny("llama"))
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, folder / WEIGHTS)
    stepper = Stepper(cuda_native(folder))
    context = stepper.context()
    first = stepper.submit([Request(context, [1, 2], samples=[Sample()])])
    second = stepper.submit([Request(context, [FromTicket(first, 0)], samples=[Sample()])])
    assert stepper.collect(first).failed == {0: "the logits are not numbers"}
    assert 0 in stepper.collect(second).failed


def test_more_samplers_than_the_ring_holds_are_refused() -> None:
    driver = cuda_native(checkpoint(), max_batch_tokens=8, max_batch_requests=1)
    stepper = Stepper(driver)
    request = Request(_roomy(stepper, 1), [1], samples=[Sample()] * 9)
    with pytest.raises(ForwardError, match="9 samplers, at most 8"):
        driver.collect(driver.submit(stepper.build([request])))


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    (declaration,) = pie_drivers()

    def load(device: str, **options: Any) -> Driver:
        return declaration.load(
            DriverRequest(checkpoint(), device, CudaNativeOptions(**options), ARCHITECTURES, {})
        )

    with pytest.raises(LoadError, match="expected cuda"):
        load("meta")
    if not torch.cuda.is_available():
        with pytest.raises(LoadError, match="sees no CUDA GPU"):
            load("cuda")
        with pytest.raises(LoadError, match="'flashinfer', which needs a GPU"):
            load("cpu", attention="flashinfer")


def test_a_closed_driver_frees_its_pages_whoever_still_holds_it() -> None:
    driver = cuda_native(checkpoint())
    stepper = Stepper(driver)
    stepper.run([Request(stepper.context(), [1, 2, 3], samples=[Sample()])])
    assert isinstance(driver, CudaNativeDriver)
    pages = weakref.ref(driver.parts()[1][0])
    driver.close()
    assert pages() is None


def test_random_weights_need_a_configuration_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3", tie_word_embeddings=True)))
    tokens = [decoded(Stepper(cuda_native(tmp_path, random_weights=True)), 2, 4, Sample()) for _ in range(2)]
    assert tokens[0] == tokens[1]


def test_pages_take_what_weights_steps_and_others_leave() -> None:
    use = MemoryUse(total=100 * GIB, others=2 * GIB, weights=16 * GIB, activations=4 * GIB)
    assert pages_that_fit(use, 0.9, 2**20) == (90 - 2 - 16 - 4) * 1024 - GRAPH_RESERVE // 2**20


def test_no_room_for_pages_is_told_with_the_whole_sum() -> None:
    use = MemoryUse(total=16 * GIB, others=0, weights=16 * GIB, activations=GIB)
    with pytest.raises(LoadError, match=r"weights take 16384, a step of max_batch_tokens 1024"):
        pages_that_fit(use, 0.9, 2**20)


def test_graphs_are_recorded_with_progress() -> None:
    seen = []
    (declaration,) = pie_drivers()
    options = CudaNativeOptions(dtype="float32", total_pages=64, max_batch_requests=4, graph_rows=20)
    request = DriverRequest(
        checkpoint(), DEVICE, options, ARCHITECTURES, {}, lambda each: seen.append(each.label)
    )
    declaration.load(request).close()
    prompts = len(up_to(ROWS, 20)) + 1 + len(up_to(ASKED, 4))  # one more for full steps
    recorded = sum(label.startswith("recording graphs of") for label in seen)
    assert recorded == len(cuda_graphs.bucket_sizes(4)) + prompts


@pytest.mark.parametrize(("swap_bytes", "expected"), [(0, 0), (10**6, None), (10**12, 8 * 512)])
def test_host_pages_are_what_the_swap_memory_holds(swap_bytes: int, expected: int | None) -> None:
    capabilities = cuda_native(checkpoint(), swap_bytes=swap_bytes).capabilities
    (space,) = capabilities.cache
    page_bytes = space.group.unit_bytes * space.page_size
    assert space.num_host_pages == (swap_bytes // page_bytes if expected is None else expected)
    assert capabilities.has(Feature.SWAP) == (space.num_host_pages > 0)


PREFIX, COUNT = 208, 24  # 13 pages of 16; two tiles


def forked(stepper: Stepper, count: int) -> list[Context]:
    """Contexts with a prefix in common."""
    first = stepper.context()
    stepper.run([Request(first, [(5 * row) % 300 for row in range(PREFIX)], samples=[Sample()])])
    return [first, *(stepper.fork(first) for _ in range(count - 1))]


@pytest.mark.parametrize("graphs", [True, False])
def test_a_prefix_that_is_read_together_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    together: list[int] = []

    def noting(groups: PrefixGroups, eligible: Any) -> Any:
        planned = plan_tiles(groups, eligible, least_saved=1)
        together.append(planned.count)
        return planned

    monkeypatch.setattr(batch_tensors, "plan_tiles", noting)
    found = []
    for groups in ([], [(0, COUNT, PREFIX)]):
        stepper = Stepper(cuda_native(checkpoint(), max_batch_requests=32, cuda_graphs=graphs))
        requests = [
            Request(context, [place + 1], samples=[Sample()], probes=[Probe(ProbeKind.LOGITS)])
            for place, context in enumerate(forked(stepper, COUNT))
        ]
        for request in requests:
            stepper.make_room(request.context, 1)
        columns = np.array(groups, np.int32).reshape(-1, 3).T
        batch = replace(stepper.build(requests), prefixes=PrefixGroups(*columns))
        result = stepper.collect(stepper.submit_batch(requests, batch))
        found.append(np.stack([probe_values(result, place) for place in range(COUNT)]))
    assert together == [2]
    assert np.linalg.norm(found[0] - found[1]) <= 1e-5 * np.linalg.norm(found[0])


@pytest.mark.parametrize(
    ("groups", "first", "stop"),
    [
        ([(0, 16, 300)], [0], [16]),
        ([(0, 17, 300)], [0], [16]),
        ([(0, 20, 300)], [0, 16], [16, 20]),
        ([(1, 3, 100), (3, 6, 3000)], [3, 1], [6, 3]),
        ([(0, 8, 100), (8, 10, 100)], [], []),
        ([(0, 8, 9000), (20, 22, 5000)], [0], [8]),
    ],
    ids=["one tile", "a lonely last", "two tiles", "most saved first", "too little saved", "not eligible"],
)
def test_tiles_of_shared_prefixes(
    groups: list[tuple[int, int, int]], first: list[int], stop: list[int]
) -> None:
    eligible = np.ones(22, np.bool_)
    eligible[21] = False
    tiles = plan_tiles(PrefixGroups(*np.array(groups, np.int32).T), eligible, least_saved=4096)
    assert (tiles.first.tolist(), tiles.stop.tolist()) == (first, stop)
    covered = {place for low, high in zip(first, stop, strict=True) for place in range(low, high)}
    assert set(np.flatnonzero(tiles.columns).tolist()) == covered
