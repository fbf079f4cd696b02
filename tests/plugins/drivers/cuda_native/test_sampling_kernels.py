"""Sampling on the device against the core's numpy reference: plain and fused kernels alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pie_core.contracts.forward import NO_TICKET, Float32, Samplers, TokenRefs
from pie_core.contracts.sampling import gumbel_noise, random_words
from pie_core.contracts.sampling_reference import adjusted_logits, sample_tokens
from pie_plugins.drivers.cuda_native import torch_kernels
from pie_plugins.drivers.cuda_native.outcomes import Failure
from pie_plugins.drivers.cuda_native.samplers import LogitChanges
from pie_plugins.drivers.cuda_native.step_tensors import StepTensors
from pie_plugins.drivers.cuda_native.timeline import timeline_of
from tests.plugins.drivers.cuda_native.both_kernels import (
    every_kernel,
    host_step,
    kernels,
    literal,
    needs_triton,
    on_device,
    with_samplers,
)
from tests.plugins.drivers.cuda_native.machine import DEVICE

VOCAB = 70


def random_samplers(seed: int, count: int, vocab_size: int = VOCAB) -> Samplers:
    """Every option on or off at random, with histories, biases and masks of random sizes."""
    random = np.random.default_rng(seed)

    def either(off: float, on: tuple[float, ...]) -> Float32:
        return random.choice([off, *on], count).astype(np.float32)

    history, bias = random.integers(0, 6, count), random.integers(0, 3, count)
    seen = random.integers(0, vocab_size, history.sum()).astype(np.int32)
    return Samplers(
        rows=np.arange(count, dtype=np.int32),
        temperature=either(0.0, (0.3, 1.0, 2.5)),
        top_k=random.choice([0, 1, 5, 40, 1000], count).astype(np.int32),
        top_p=either(1.0, (0.0, 0.05, 0.6, 0.95)),
        min_p=either(0.0, (0.02, 0.4)),
        repetition=either(1.0, (0.8, 1.3)),
        presence=either(0.0, (0.5, -0.5)),
        frequency=either(0.0, (0.2,)),
        stream=random.integers(0, 2**63, count).astype(np.uint64) * np.uint64(2),
        index=random.integers(0, 2**32, count).astype(np.uint32),
        slot=random.integers(0, 2**17, count).astype(np.uint32),
        epoch=random.integers(0, 3, count).astype(np.uint32),
        history_indptr=np.cumsum([0, *history]).astype(np.int32),
        history=TokenRefs(seen, np.full(len(seen), NO_TICKET), np.zeros(len(seen), np.int32)),
        history_counts=random.integers(0, 4, history.sum()).astype(np.int32),
        bias_indptr=np.cumsum([0, *bias]).astype(np.int32),
        bias_tokens=random.integers(0, vocab_size, bias.sum()).astype(np.int32),
        bias_values=random.normal(size=bias.sum()).astype(np.float32),
        mask_index=random.integers(-1, 3, count).astype(np.int32),
        logit_masks=random.integers(0, 2**32, (3, (vocab_size + 31) // 32), dtype=np.uint64).astype(
            np.uint32
        ),
    )


def filters_only(samplers: Samplers) -> Samplers:
    """Without what changes the logits."""
    count, none = len(samplers.rows), np.zeros(0, np.int32)
    return replace(
        samplers,
        repetition=np.ones(count, np.float32),
        presence=np.zeros(count, np.float32),
        frequency=np.zeros(count, np.float32),
        history_indptr=np.zeros(count + 1, np.int32),
        history=TokenRefs(none, none.astype(np.int64), none),
        history_counts=none,
        bias_indptr=np.zeros(count + 1, np.int32),
        bias_tokens=none,
        bias_values=np.zeros(0, np.float32),
        mask_index=np.full(count, -1, np.int32),
    )


def step_of(samplers: Samplers) -> StepTensors:
    count = len(samplers.rows)
    step = on_device(with_samplers(host_step([1] * count, [0] * count, [[0]] * count, [0] * count), samplers))
    step.shift.zero_()
    return step


def drawn(name: str, logits: Float32, samplers: Samplers) -> tuple[list[int], list[int]]:
    """Tokens, and the failure of each request."""
    step = step_of(samplers)
    tokens = kernels(name).sample(torch.from_numpy(logits.copy()).to(DEVICE), step)
    return tokens.tolist(), step.fail.tolist()


def assert_as_the_reference(name: str, logits: Float32, samplers: Samplers) -> None:
    tokens, failures = drawn(name, logits, samplers)
    assert not any(failures)
    assert tokens == sample_tokens(logits, samplers, samplers.history.ids).tolist()


@every_kernel
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 6), spread=st.sampled_from([0.5, 3.0, 12.0]))
def test_tokens_equal_the_reference_whatever_the_filters(
    name: str, seed: int, count: int, spread: float
) -> None:
    logits = (np.random.default_rng(seed + 1).normal(size=(count, VOCAB)) * spread).astype(np.float32)
    assert_as_the_reference(name, logits, filters_only(random_samplers(seed, count)))


@every_kernel
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_equal_logits_are_kept_and_chosen_by_the_lower_id(name: str, seed: int) -> None:
    logits = np.random.default_rng(seed).integers(-1, 2, (4, VOCAB)).astype(np.float32)
    logits[0] *= -0.0  # zeros of both signs are equal
    assert_as_the_reference(name, logits, filters_only(random_samplers(seed, 4)))


@every_kernel
def test_a_vocabulary_of_many_blocks_equals_the_reference(name: str) -> None:
    size, count = 9001, 5
    samplers = replace(
        filters_only(random_samplers(3, count, size)),
        temperature=np.array([1, 1, 1, 0, 0.7], np.float32),
        top_k=np.array([0, 0, 3000, 20, 0], np.int32),
        top_p=np.array([0.9, 1.0, 0.99, 0.5, 0.3], np.float32),
        min_p=np.array([0, 0, 0, 0, 0.001], np.float32),
    )
    logits = np.random.default_rng(4).normal(size=(count, size)).astype(np.float32)
    if name == "torch":
        return assert_as_the_reference(name, logits, samplers)
    with cut_into(4096, 256):
        assert_as_the_reference(name, logits, samplers)


@contextmanager
def cut_into(chunk: int, listable: int) -> Iterator[None]:
    """Small chunks and short lists, so that small vocabularies go every way that large ones go."""
    from pie_plugins.drivers.cuda_native import fused_sampling  # imports triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_sampling, "CHUNK", chunk)
        patch.setattr(fused_sampling, "LISTABLE", listable)
        yield


@needs_triton
@pytest.mark.parametrize("listable", [8, 32, 128])
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 1.0, 4.0, 20.0]))
def test_rows_of_many_chunks_equal_the_reference(listable: int, seed: int, spread: float) -> None:
    """Rows whose likely tokens can be listed, and others."""
    size, count = 300, 5
    logits = (np.random.default_rng(seed).normal(size=(count, size)) * spread).astype(np.float32)
    with cut_into(64, listable):
        assert_as_the_reference("triton", logits, filters_only(random_samplers(seed, count, size)))


@needs_triton
@pytest.mark.parametrize("listable", [8, 128])
def test_more_equal_logits_than_can_be_listed_are_cut_by_their_ids(listable: int) -> None:
    size, count = 300, 6
    samplers = replace(
        filters_only(random_samplers(5, count, size)),
        temperature=np.array([1, 0.5, 2, 1, 1, 1.5], np.float32),
        top_k=np.array([0, 100, 90, 0, 4, 299], np.int32),
        top_p=np.array([0.4, 1.0, 0.5, 0.99, 0.9, 1.0], np.float32),
    )
    logits = np.random.default_rng(1).integers(-1, 2, (count, size)).astype(np.float32)
    with cut_into(64, listable):
        assert_as_the_reference("triton", logits, samplers)


@needs_triton
@pytest.mark.parametrize("listable", [32, 128])
def test_logits_that_scale_to_one_number_are_cut_by_their_ids(listable: int) -> None:
    """Neighbours among floats, divided by more than one: no threshold may part what comes out equal."""
    size, count = 300, 8
    samplers = replace(
        filters_only(random_samplers(13, count, size)),
        temperature=np.array([1.5, 1.7, 3, 1.9, 1.3, 1.1, 2.5, 1.6], np.float32),
        top_k=np.array([0, 0, 40, 7, 0, 11, 0, 0], np.int32),
        top_p=np.array([0.1, 0.02, 1.0, 0.5, 0.3, 0.7, 0.01, 0.05], np.float32),
        min_p=np.zeros(count, np.float32),
    )
    random = np.random.default_rng(5)
    logits = (1.0 + random.integers(0, 24, (count, size)) * 2.0**-23).astype(np.float32)
    with cut_into(64, listable):
        assert_as_the_reference("triton", logits, samplers)


@needs_triton
@pytest.mark.parametrize("listable", [8, 32, 128])
def test_min_p_alone_and_hidden_logits_leave_what_the_reference_leaves(listable: int) -> None:
    size, count = 300, 8
    samplers = replace(
        filters_only(random_samplers(14, count, size)),
        temperature=np.array([1, 0.5, 2, 1, 1, 1.5, 1, 1], np.float32),
        top_k=np.array([0, 0, 0, 0, 50, 5, 0, 0], np.int32),
        top_p=np.array([1.0, 1.0, 1.0, 1.0, 0.8, 1.0, 0.9, 0.0], np.float32),
        min_p=np.array([0.05, 0.3, 1e-5, 1.0, 0.01, 0, 0, 0], np.float32),
    )
    random = np.random.default_rng(6)
    logits = (random.normal(size=(count, size)) * 3 - 400).astype(np.float32)
    logits[4:, random.permutation(size)[12:]] = -np.inf
    with cut_into(64, listable):
        assert_as_the_reference("triton", logits, samplers)


@needs_triton
def test_scores_that_rounding_makes_equal_go_to_the_lower_id() -> None:
    """At a low temperature the noise is less than the distance between two scores."""
    size, count = 300, 8
    samplers = replace(
        filters_only(random_samplers(6, count, size)),
        temperature=np.full(count, 1e-6, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.tile(np.array([1.0, 0.7], np.float32), count // 2),
        min_p=np.zeros(count, np.float32),
    )
    logits = np.random.default_rng(2).integers(10, 14, (count, size)).astype(np.float32)
    with cut_into(64, 32):
        assert_as_the_reference("triton", logits, samplers)


@every_kernel
def test_bfloat16_logits_are_drawn_from_as_they_are(name: str) -> None:
    size, count = 200, 6
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(count, size)) * 2).to(torch.bfloat16)
    samplers = filters_only(random_samplers(9, count, size))
    tokens = kernels(name).sample(logits.to(DEVICE), step_of(samplers)).tolist()
    exact = logits.to(torch.float32).numpy()
    assert tokens == sample_tokens(exact, samplers, samplers.history.ids).tolist()


@needs_triton
def test_a_row_draws_the_same_token_alone_and_anywhere_in_company() -> None:
    size, count = 300, 6
    samplers = filters_only(random_samplers(12, count, size))
    logits = np.random.default_rng(4).normal(size=(count, size)).astype(np.float32)
    with cut_into(64, 32):
        together, _ = drawn("triton", logits, samplers)
        backwards, _ = drawn("triton", logits[::-1], _chosen(samplers, list(range(count))[::-1]))
        alone = [
            drawn("triton", logits[row : row + 1], _chosen(samplers, [row]))[0][0] for row in range(count)
        ]
    assert together == backwards[::-1] == alone


def _chosen(samplers: Samplers, rows: list[int]) -> Samplers:
    """These samplers, in this order, without what changes the logits."""
    parts = ("temperature", "top_k", "top_p", "min_p", "stream", "index", "slot", "epoch")
    chosen = {name: getattr(samplers, name)[rows] for name in parts}
    places = np.arange(len(rows), dtype=np.int32)
    return filters_only(replace(samplers, rows=places, **chosen))


@every_kernel
def test_logits_that_are_not_numbers_or_all_hidden_fail_their_request_only(name: str) -> None:
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    logits[0] = -np.inf
    logits[1, 7] = np.nan
    samplers = replace(filters_only(random_samplers(8, 3)), temperature=np.ones(3, np.float32))
    tokens, failures = drawn(name, logits, samplers)
    assert failures == [Failure.NOTHING_ALLOWED, Failure.NOT_A_NUMBER, Failure.NONE]
    assert all(0 <= token < VOCAB for token in tokens)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 8))
def test_changed_logits_equal_the_reference(seed: int, count: int) -> None:
    samplers = random_samplers(seed, count)
    logits = np.random.default_rng(seed).normal(size=(count, VOCAB)).astype(np.float32)
    expected = adjusted_logits(logits, samplers, samplers.history.ids)
    step = with_samplers(host_step([1] * count, [0] * count, [[0]] * count, [0] * count), samplers)
    step.history = literal(samplers.history.ids)
    timeline = timeline_of(torch.device(DEVICE))
    with timeline.main():
        changed = torch.from_numpy(logits.copy()).to(DEVICE)
        fail, ring = torch.zeros(2, count, dtype=torch.int32, device=DEVICE)
        LogitChanges(timeline, ring).apply(changed, step, fail)
        np.testing.assert_allclose(changed.cpu().numpy(), expected, rtol=1e-6)
        assert not fail.any()


def test_random_words_are_the_core_s_own() -> None:
    samplers = random_samplers(11, 5)
    expected = random_words(samplers.stream, samplers.index, samplers.slot, samplers.epoch, VOCAB)
    found = torch_kernels.random_words(step_of(samplers), VOCAB).cpu().numpy()
    np.testing.assert_array_equal(found.astype(np.uint32), expected)


@needs_triton
def test_the_fused_kernels_draw_the_core_s_own_words_and_noise() -> None:
    from tests.plugins.drivers.cuda_native.noise_kernel import fused_noise

    samplers = random_samplers(11, 3)
    counter = (samplers.stream, samplers.index, samplers.slot, samplers.epoch)
    words, noise = fused_noise(step_of(samplers), VOCAB)
    np.testing.assert_array_equal(words.cpu().numpy().view(np.uint32), random_words(*counter, VOCAB))
    np.testing.assert_allclose(noise.cpu().numpy(), gumbel_noise(*counter, VOCAB), rtol=3e-6, atol=3e-7)


@needs_triton
def test_the_luckiest_and_unluckiest_noise_is_accurate() -> None:
    """Near 1 the hardware's logarithm is off by more than the noise itself."""
    from tests.plugins.drivers.cuda_native.noise_kernel import fused_log

    edges = np.concatenate([np.arange(64), np.arange(2**23 - 64, 2**23), np.arange(0, 2**23, 65521)])
    uniform = (edges.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    expected = np.log(uniform.astype(np.float64))
    found = fused_log(torch.from_numpy(uniform).to(DEVICE)).cpu().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-7)


@pytest.mark.parametrize("moved", [0, 3])
def test_the_noise_counts_from_the_true_length(moved: int) -> None:
    samplers = random_samplers(2, 1)
    step = step_of(replace(samplers, index=samplers.index + np.uint32(moved)))
    step.shift.fill_(moved)
    expected = random_words(samplers.stream, samplers.index, samplers.slot, samplers.epoch, VOCAB)
    found = torch_kernels.random_words(step, VOCAB).cpu().numpy().astype(np.uint32)
    np.testing.assert_array_equal(found, expected)
