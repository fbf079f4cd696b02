"""The portable sampler against the core's numpy reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.contracts.forward import NO_TICKET, Float32, Samplers, TokenRefs
from pie_core.contracts.sampling_reference import sample_tokens
from pie_plugins.drivers.portable.sampler import SamplerInputs, draw

VOCAB = 70


def random_samplers(seed: int, count: int, vocab_size: int = VOCAB) -> Samplers:
    """Every option on or off at random, with histories, biases and masks of random sizes."""
    random = np.random.default_rng(seed)

    def either(off: float, on: tuple[float, ...]) -> Float32:
        return random.choice([off, *on], count).astype(np.float32)

    history, bias = random.integers(0, 6, count), random.integers(0, 3, count)
    masks = random.integers(0, 2**32, (3, (vocab_size + 31) // 32), dtype=np.uint64).astype(np.uint32)
    return Samplers(
        rows=np.arange(count, dtype=np.int32),
        temperature=either(0.0, (0.3, 1.0, 2.5)),
        top_k=random.choice([0, 1, 5, 40, 1000], count).astype(np.int32),
        top_p=either(1.0, (0.05, 0.6, 0.95)),
        min_p=either(0.0, (0.02, 0.4)),
        repetition=either(1.0, (0.8, 1.3)),
        presence=either(0.0, (0.5, -0.5)),
        frequency=either(0.0, (0.2,)),
        stream=random.integers(0, 2**63, count).astype(np.uint64),
        index=random.integers(0, 2**20, count).astype(np.uint32),
        slot=random.integers(0, 3, count).astype(np.uint32),
        epoch=random.integers(0, 3, count).astype(np.uint32),
        history_indptr=np.cumsum([0, *history]).astype(np.int32),
        history=literal(random.integers(0, vocab_size, history.sum())),
        history_counts=random.integers(0, 4, history.sum()).astype(np.int32),
        bias_indptr=np.cumsum([0, *bias]).astype(np.int32),
        bias_tokens=random.integers(0, vocab_size, bias.sum()).astype(np.int32),
        bias_values=random.normal(size=bias.sum()).astype(np.float32),
        mask_index=random.integers(-1, 3, count).astype(np.int32),
        logit_masks=masks,
    )


def literal(ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> TokenRefs:
    return TokenRefs(ids.astype(np.int32), np.full(len(ids), NO_TICKET), np.zeros(len(ids), np.int32))


def tokens_of(logits: Float32, samplers: Samplers) -> list[int]:
    inputs = SamplerInputs(
        samplers,
        samplers.index,
        samplers.history.ids.astype(np.int64),
        samplers.history_counts.astype(np.int64),
    )
    drawn = draw(torch.from_numpy(logits.copy()), inputs)
    assert not drawn.failed
    return [int(token) for token in drawn.tokens]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 9), spread=st.sampled_from([0.5, 3.0, 12.0]))
def test_tokens_equal_the_reference_whatever_the_options(seed: int, count: int, spread: float) -> None:
    samplers = random_samplers(seed, count)
    logits = (np.random.default_rng(seed + 1).normal(size=(count, VOCAB)) * spread).astype(np.float32)
    assert tokens_of(logits, samplers) == sample_tokens(logits, samplers, samplers.history.ids).tolist()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_equal_logits_are_kept_and_chosen_by_the_lower_id(seed: int) -> None:
    samplers = replace(random_samplers(seed, 6), bias_values=np.zeros(0, np.float32))
    samplers = replace(samplers, bias_indptr=np.zeros(7, np.int32), bias_tokens=np.zeros(0, np.int32))
    logits = np.random.default_rng(seed).integers(0, 3, (6, VOCAB)).astype(np.float32)
    assert tokens_of(logits, samplers) == sample_tokens(logits, samplers, samplers.history.ids).tolist()


def test_a_flat_distribution_over_a_large_vocabulary_equals_the_reference() -> None:
    """More tokens pass top-p than are ranked at first."""
    size, count = 5000, 4
    plain = random_samplers(3, count, size)
    samplers = replace(
        plain,
        temperature=np.ones(count, np.float32),
        top_k=np.array([0, 0, 3000, 20], np.int32),
        top_p=np.array([0.9, 0.4, 0.99, 0.5], np.float32),
    )
    logits = np.random.default_rng(4).normal(size=(count, size)).astype(np.float32)
    assert tokens_of(logits, samplers) == sample_tokens(logits, samplers, samplers.history.ids).tolist()


def test_a_mask_that_hides_everything_and_logits_that_are_not_numbers_fail_their_sampler_only() -> None:
    samplers = replace(
        random_samplers(8, 3),
        mask_index=np.array([0, -1, -1], np.int32),
        logit_masks=np.zeros((1, (VOCAB + 31) // 32), np.uint32),
    )
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    logits[1, 7] = np.nan
    inputs = SamplerInputs(
        samplers,
        samplers.index,
        samplers.history.ids.astype(np.int64),
        samplers.history_counts.astype(np.int64),
    )
    drawn = draw(torch.from_numpy(logits), inputs)
    assert sorted(drawn.failed) == [0, 1]
    assert "mask" in drawn.failed[0]
    assert "not numbers" in drawn.failed[1]
