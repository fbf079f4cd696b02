"""Steps with prompts, replayed: what eager steps give, at every bucket's border, whatever lay in the block before."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import ForwardResult, ProbeKind, last_accepted
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import FromTicket, Mask, Probe, Request, Sample, Stepper, Token, probe_values
from pie_plugins.drivers.cuda_native.driver import CudaNativeDriver
from pie_plugins.drivers.cuda_native.prompt_graphs import MOST_DRAFTS, PromptGraphs, PromptReplay
from pie_plugins.drivers.cuda_native.step_runner import Recorded, StepRunner
from tests.plugins.drivers.cuda_native.machine import cuda_native
from tests.plugins.models.reference import ARCHITECTURES, tiny

DRAWN = Sample(temperature=1.0, stream=9, top_p=0.8)


@cache
def checkpoint() -> Path:
    folder = Path(mkdtemp())
    write_checkpoint(folder, ARCHITECTURES["qwen3"], tiny("qwen3"))
    return folder


@cache
def driver(graph_rows: int) -> Driver:
    return cuda_native(checkpoint(), graph_rows=graph_rows, kv_page_size=4, total_pages=1024)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Token rows and asked rows of the recordings that steps went through."""
    sizes: list[tuple[int, int]] = []
    replay = StepRunner._replay

    def noting(self: StepRunner, recorded: Recorded, *arguments: Any) -> Any:
        if isinstance(recorded, PromptReplay):
            sizes.append((recorded._forward.tensors.sizes.rows, recorded.tensors.sizes.asked))
        return replay(self, recorded, *arguments)

    monkeypatch.setattr(StepRunner, "_replay", noting)
    return sizes


def prompt(rows: int, seed: int = 0) -> list[int]:
    return [(7 * row + 13 * seed + row * row) % 300 for row in range(rows)]


def both(counts: list[int], behind: list[int], sample: Sample = Sample()) -> Iterator[ForwardResult]:  # noqa: B008
    """Requests of so many rows behind so many others, with a sampler and logits each: eager and replayed."""
    for graph_rows in (0, 96):
        stepper = Stepper(driver(graph_rows))
        contexts = [stepper.context() for _ in counts]
        for place, (context, rows) in enumerate(zip(contexts, behind, strict=True)):
            if rows:
                stepper.run([Request(context, prompt(rows, place))])
        probes = [Probe(ProbeKind.LOGITS)]
        yield stepper.run(
            [
                Request(context, prompt(rows, place + 50), samples=[sample], probes=probes)
                for place, (context, rows) in enumerate(zip(contexts, counts, strict=True))
            ]
        )
        for context in contexts:
            stepper.book.drop_context(context)


def assert_same(found: ForwardResult, expected: ForwardResult) -> None:
    assert found.failed == expected.failed == {}
    assert found.tokens.tolist() == expected.tokens.tolist()
    for place in range(len(expected.tokens)):
        seen, wanted = probe_values(found, place), probe_values(expected, place)
        assert np.linalg.norm(seen - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("rows", [2, 15, 16, 17, 31, 32, 33, 64, 65, 95, 96])
def test_a_prompt_at_below_and_above_a_bucket_s_rows(replayed: list[tuple[int, int]], rows: int) -> None:
    eager, recorded = both([rows], [0], DRAWN)
    assert_same(recorded, eager)
    assert replayed == [(next(size for size in (16, 32, 64, 96) if size >= rows), 8)]


@settings(max_examples=12, deadline=None)
@given(
    told=st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 9, 20]), st.integers(0, 60)), min_size=1, max_size=8)
)
def test_any_mix_of_prompts_and_decoding(told: list[tuple[int, int]]) -> None:
    counts, behind = (list(values) for values in zip(*told, strict=True))
    eager, recorded = both(counts, behind)
    assert_same(recorded, eager)


def test_what_earlier_steps_left_behind_changes_nothing(replayed: list[tuple[int, int]]) -> None:
    """The block, the hidden states and the scratch page are poisoned between two equal steps."""
    graphs = graphs_of(driver(96))
    expected = list(both([20, 1], [0, 5]))[1]
    with torch.inference_mode():
        graphs._block.fill_(2**30)
        assert graphs._hidden is not None
        graphs._hidden.fill_(float("nan"))
        for each in graphs._runner.caches:
            for layer in range(each.layout.num_layers):
                each.layer(layer)[each.scratch_page] = float("nan")
    found = list(both([20, 1], [0, 5]))[1]
    assert_same(found, expected)
    assert replayed[-1] == (32, 8)


def graphs_of(driver: Driver) -> PromptGraphs:
    assert isinstance(driver, CudaNativeDriver)
    graphs = driver.parts()[0].prompts
    assert graphs is not None
    return graphs


@pytest.mark.parametrize("right", [0, 2, 3])
def test_drafts_are_verified_beside_a_prompt(replayed: list[tuple[int, int]], right: int) -> None:
    """And the next step, queued before that is known, begins behind what was accepted."""
    found = []
    for graph_rows in (0, 96):
        stepper = Stepper(driver(graph_rows))
        one, two = stepper.context(), stepper.context()
        token = int(stepper.run([Request(one, prompt(9), samples=[Sample()])]).tokens[0])
        fork, truth = stepper.fork(one), [token]
        for _ in range(5):
            truth.append(int(stepper.run([Request(fork, truth[-1:], samples=[Sample()])]).tokens[0]))
        drafts = [each if place < right else (each + 1) % 300 for place, each in enumerate(truth[1:4])]
        first = stepper.submit(
            [
                Request(two, prompt(21), samples=[Sample()]),
                Request(one, [token, *drafts], samples=[Sample(row) for row in range(4)], drafts=3),
            ]
        )
        end: list[Token] = [FromTicket(first, last_accepted(1))]
        second = stepper.submit(
            [Request(one, end, samples=[Sample()]), Request(two, prompt(3), samples=[Sample()])]
        )
        verified, behind = stepper.collect(first), stepper.collect(second)
        assert verified.accepted.tolist() == [0, right]
        assert behind.tokens[0] == truth[right + 2]
        found.append((verified.tokens.tolist(), behind.tokens.tolist()))
        for context in (one, two, fork):
            stepper.book.drop_context(context)
    assert found[1] == found[0]
    assert (32, 8) in replayed
    assert (16, 8) in replayed


def test_probes_and_changed_logits_of_a_mixed_step(replayed: list[tuple[int, int]]) -> None:
    """Probes look at rows without a sampler, too; two samplers share a row."""
    found = []
    for graph_rows in (0, 96):
        stepper = Stepper(driver(graph_rows))
        one, two = stepper.context(), stepper.context()
        samples = [
            Sample(4, presence=50.0, history=[3], bias=[(9, 3.0)]),
            Sample(11),
            Sample(11, temperature=1.0),
        ]
        probes = [
            Probe(ProbeKind.LOGITS, row=2),
            Probe(ProbeKind.ENTROPY, row=11),
            Probe(ProbeKind.HIDDEN, row=0),
        ]
        result = stepper.run(
            [Request(one, prompt(12), samples=samples, probes=probes), Request(two, prompt(7))]
        )
        assert not result.failed
        found.append((result.tokens.tolist(), [probe_values(result, place) for place in range(3)]))
        for context in (one, two):
            stepper.book.drop_context(context)
    assert found[1][0] == found[0][0]
    for seen, wanted in zip(found[1][1], found[0][1], strict=True):
        assert np.abs(seen - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert replayed == [(32, 8)]


def test_a_piece_of_a_prompt_that_nobody_asks_about_has_no_logits(replayed: list[tuple[int, int]]) -> None:
    stepper = Stepper(driver(96))
    context = stepper.context()
    stepper.run([Request(context, prompt(20))])
    pieces = stepper.run([Request(context, prompt(20, 1), samples=[Sample()])]).tokens.tolist()
    whole = stepper.context()
    expected = stepper.run([Request(whole, prompt(20) + prompt(20, 1), samples=[Sample()])]).tokens.tolist()
    assert pieces == expected
    assert replayed == [(32, 0), (32, 8), (64, 8)]
    for each in (context, whole):
        stepper.book.drop_context(each)


def test_a_refused_request_leaves_the_others_of_a_mixed_step_alone(replayed: list[tuple[int, int]]) -> None:
    stepper = Stepper(driver(96))
    good, bad = stepper.context(), stepper.context()
    expected = stepper.run([Request(good, prompt(10), samples=[Sample()])]).tokens.tolist()
    stepper.book.drop_context(good)
    good = stepper.context()
    stepper.run([Request(bad, [1, 2])])
    bad.pages[0][0] = 5000
    result = stepper.run(
        [Request(bad, [3], samples=[Sample()]), Request(good, prompt(10), samples=[Sample()])]
    )
    assert list(result.failed) == [0]
    assert result.tokens.tolist()[1:] == expected
    assert replayed[-1] == (16, 8)
    bad.pages[0][0] = 0


def test_what_is_masked_or_too_large_runs_eagerly(replayed: list[tuple[int, int]]) -> None:
    stepper = Stepper(driver(96))
    context = stepper.context()
    stepper.run([Request(context, prompt(97))])
    stepper.run([Request(context, prompt(3), masks=[Mask(0, [(0, 98)])])])
    drafts = MOST_DRAFTS + 1
    samples = [Sample(row) for row in range(drafts + 1)]
    stepper.run([Request(context, prompt(drafts + 1), samples=samples, drafts=drafts)])
    assert replayed == []
    stepper.book.drop_context(context)


def test_full_steps_are_replayed_and_those_between_are_not(replayed: list[tuple[int, int]]) -> None:
    tokens = []
    for graph_rows in (0, 32):
        options = {"graph_rows": graph_rows, "max_batch_tokens": 400, "kv_page_size": 4, "total_pages": 1024}
        stepper = Stepper(cuda_native(checkpoint(), **options))
        drawn = []
        for counts in ((400,), (200, 73), (200, 72), (33,)):
            contexts = [stepper.context() for _ in counts]
            requests = [
                Request(context, prompt(count), samples=[Sample()])
                for context, count in zip(contexts, counts, strict=True)
            ]
            drawn += stepper.run(requests).tokens.tolist()
            for context in contexts:
                stepper.book.drop_context(context)
        tokens.append(drawn)
    assert tokens[0] == tokens[1]
    assert replayed == [(400, 8), (400, 8)], "400 and 273 rows; 272 are too far from it"


def test_nothing_is_recorded_for_prompts_where_that_is_not_wanted() -> None:
    for options in ({"graph_rows": 0}, {"cuda_graphs": False}, {"batch_invariant": True}):
        loaded = cuda_native(checkpoint(), **options)
        assert isinstance(loaded, CudaNativeDriver)
        assert loaded.parts()[0].prompts is None
        loaded.close()
