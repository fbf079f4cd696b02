"""Known answers of the noise, and every rule of sampling on logits small enough to follow by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pie_core.contracts.driver import DriverCapabilities
from pie_core.contracts.forward import Float32, Samplers, UInt32
from pie_core.contracts.sampling import column_slots, derive_stream, gumbel_noise, philox4x32, random_words
from pie_core.contracts.sampling_reference import (
    adjusted_logits,
    distribution,
    entropy,
    filtered_logits,
    log_softmax,
    sample_tokens,
)
from pie_core.testing.batches import Context, Request, Sample, build_batch

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.2, 0.1], np.float32))
FULL = 0xFFFFFFFF


CAPABILITIES = DriverCapabilities(
    driver="none",
    architecture="none",
    vocab_size=5,
    hidden_size=1,
    max_model_len=64,
    max_batch_tokens=64,
    max_batch_requests=8,
    cache=(),
    features=frozenset(),
    weights_revision="",
    kv_dtype="",
)


def samplers_of(*samples: Sample) -> Samplers:
    request = Request(Context(1, [], [], []), [0], samples=samples)
    return build_batch([request], CAPABILITIES).samplers


def adjusted(sample: Sample) -> Float32:
    samplers = samplers_of(sample)
    scores: Float32 = adjusted_logits(LOGITS[None], samplers, samplers.history.ids)[0]
    return scores


def drawn(sample: Sample, count: int) -> list[int]:
    """Tokens at that many indexes."""
    samplers = samplers_of(*(replace(sample, index=index, slot=0) for index in range(count)))
    return list(map(int, sample_tokens(np.repeat(LOGITS[None], count, 0), samplers, samplers.history.ids)))


def kept_by(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    filters = (np.array([top_k], np.int32), np.array([top_p], np.float32), np.array([min_p], np.float32))
    return np.flatnonzero(np.isfinite(filtered_logits(LOGITS[None], *filters)[0])).tolist()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that Random123 publishes for philox4x32-10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([FULL] * 4, [FULL] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    given = philox4x32(np.array(counter, np.uint64), np.array(key, np.uint64))
    assert given.tolist() == words


def noise(stream: int = 7, index: int = 3, slot: int = 1, epoch: int = 2, vocab_size: int = 6) -> Float32:
    counter = one(index), one(slot), one(epoch)
    values: Float32 = gumbel_noise(np.array([stream], np.uint64), *counter, vocab_size=vocab_size)[0]
    return values


def one(value: int) -> UInt32:
    return np.array([value], np.uint32)


def test_the_words_of_a_draw_never_change() -> None:
    words = random_words(np.array([7], np.uint64), one(3), one(1), one(2), 6)
    assert words.tolist() == [[2049722225, 1657630527, 3760900796, 3156751783, 2528177247, 3265282424]]
    np.testing.assert_allclose(
        noise(), [0.30145687, 0.04913275, 2.0190208, 1.1779789, 0.63498145, 1.2942708], rtol=1e-6
    )


@pytest.mark.parametrize(
    "change", [{"stream": 8}, {"index": 4}, {"slot": 2}, {"epoch": 3}, {"stream": 7 | 1 << 40}]
)
def test_noise_depends_on_every_coordinate(change: dict[str, int]) -> None:
    assert not np.array_equal(noise(), noise(**change))


def test_noise_of_a_token_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    np.testing.assert_array_equal(noise(vocab_size=6), noise(vocab_size=1000)[:6])


def test_noise_is_finite_and_has_the_mean_and_spread_of_a_gumbel_distribution() -> None:
    values = noise(vocab_size=100_000)
    assert np.isfinite(values).all()
    assert values.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert values.var() == pytest.approx(np.pi**2 / 6, abs=0.05)


def test_columns_of_one_sampler_draw_from_slots_of_their_own() -> None:
    slots = np.array([0, 1], np.uint32)
    assert len({*column_slots(slots, 0).tolist(), *column_slots(slots, 1).tolist()}) == 4


def test_the_streams_of_children_differ_and_never_change() -> None:
    assert (derive_stream(7, 1), derive_stream(7, 2)) == (3333936105286881261, 15692183212033740620)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    samplers = samplers_of(Sample())
    assert sample_tokens(
        np.array([[1, 3, 3, 0, 3]], np.float32), samplers, samplers.history.ids
    ).tolist() == [1]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    counts = np.bincount(drawn(Sample(temperature=1.0, stream=11), 4000), minlength=5)
    np.testing.assert_allclose(counts / 4000, np.exp(LOGITS), atol=0.03)


def test_a_low_temperature_sharpens() -> None:
    assert drawn(Sample(temperature=0.01), 50) == [1] * 50


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 2]),  # 2 and 3 are equals: the lower id stays
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 2]),
        ({"top_p": 0.79}, [1, 2, 3]),
        ({"top_p": 0.0}, [1]),
        ({"min_p": 0.3}, [1, 2, 3]),
        ({"min_p": 0.6}, [1]),
        ({"top_k": 3, "top_p": 0.45}, [1]),  # 0.4 of 0.8 is half after top-k
        ({"top_k": 3, "top_p": 0.55}, [1, 2]),
        ({"top_k": 4, "min_p": 0.3}, [1, 2, 3]),
    ],
)
def test_filters_keep(filters: dict[str, float], kept: list[int]) -> None:
    assert kept_by(**filters) == kept  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "filters", [{"top_k": 2}, {"top_p": 0.41}, {"min_p": 0.3}, {"top_k": 3, "top_p": 0.55, "min_p": 0.1}]
)
def test_no_token_is_drawn_that_a_filter_leaves_out(filters: dict[str, float]) -> None:
    tokens = drawn(Sample(temperature=1.0, **filters), 200)  # type: ignore[arg-type]
    assert set(tokens) == set(kept_by(**filters))  # type: ignore[arg-type]


def test_repetition_shrinks_positive_and_grows_negative_logits_of_seen_tokens() -> None:
    logits = np.array([[2.0, -2.0, 2.0, 0.0, -2.0]], np.float32)
    samplers = samplers_of(Sample(repetition=2.0, history=[0, 1, 0]))
    assert adjusted_logits(logits, samplers, samplers.history.ids)[0].tolist() == [1, -4, 2, 0, -2]


def test_presence_counts_a_token_once_and_frequency_each_time() -> None:
    sample = Sample(presence=0.5, frequency=0.25, history=[1, 2, 1], history_counts=[2, 1, 1])
    np.testing.assert_allclose(adjusted(sample) - LOGITS, [0, -1.25, -0.75, 0, 0], atol=1e-6)


def test_an_entry_that_counts_zero_times_is_not_seen() -> None:
    np.testing.assert_array_equal(adjusted(Sample(presence=1.0, history=[1], history_counts=[0])), LOGITS)


def test_history_without_penalties_changes_nothing() -> None:
    np.testing.assert_array_equal(adjusted(Sample(history=[1, 2])), LOGITS)


def test_bias_is_added_and_adds_up() -> None:
    np.testing.assert_allclose(
        adjusted(Sample(bias=[(0, 1), (3, -2), (0, 1)])) - LOGITS, [2, 0, 0, -2, 0], atol=1e-6
    )


def test_a_logit_mask_beats_a_bias() -> None:
    sample = Sample(temperature=1.0, allowed=[0, 4], bias=[(1, 100.0)])
    assert set(drawn(sample, 50)) == {0, 4}


def test_samplers_do_not_disturb_each_other() -> None:
    samples = [
        Sample(),
        Sample(temperature=1.0, stream=5, index=9, slot=0),
        Sample(allowed=[3]),
        Sample(presence=9.0, history=[1]),
        Sample(bias=[(4, 50.0)]),
    ]
    together = samplers_of(*samples)
    tokens = sample_tokens(np.repeat(LOGITS[None], 5, 0), together, together.history.ids).tolist()
    alone = []
    for sample in samples:
        one = samplers_of(sample)
        alone += sample_tokens(LOGITS[None], one, one.history.ids).tolist()
    assert tokens == alone
    assert tokens[0] == 1
    assert tokens[2:] == [3, 2, 4]


def test_a_distribution_lists_the_most_probable_first_and_the_lower_id_among_equals() -> None:
    tokens, probabilities = distribution(LOGITS, 1.0, 0)
    assert tokens.tolist() == [1, 2, 3, 0, 4]
    np.testing.assert_allclose(probabilities, [0.4, 0.2, 0.2, 0.1, 0.1], rtol=1e-6)
    assert distribution(LOGITS, 0.0, 2)[1].tolist() == [1.0, 0.0]


def test_log_probabilities_and_entropy_agree_with_the_probabilities() -> None:
    probabilities = np.exp(log_softmax(LOGITS))
    np.testing.assert_allclose(probabilities, [0.1, 0.4, 0.2, 0.2, 0.1], rtol=1e-6)
    assert entropy(LOGITS) == pytest.approx(-(probabilities * np.log(probabilities)).sum())
    assert entropy(np.array([0.0, -np.inf], np.float32)) == 0.0
