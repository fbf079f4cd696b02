"""The contract of samplers and probes: tokens as the numpy reference draws them from the driver's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pie_core.contracts.driver import Driver, Feature
from pie_core.contracts.forward import Float32, ForwardBatch, ForwardResult, ProbeKind
from pie_core.contracts.sampling import column_slots, gumbel_noise
from pie_core.contracts.sampling_reference import (
    adjusted_logits,
    distribution,
    entropy,
    filtered_logits,
    log_softmax,
)
from pie_core.testing.batches import (
    FromTicket,
    Probe,
    Request,
    Sample,
    Stepper,
    probe_tokens,
    probe_values,
)
from pie_core.testing.driver_contract.subject import DriverSubject

PLAIN = [
    Sample(),
    Sample(temperature=1.0, stream=1),
    Sample(temperature=0.7, stream=2, epoch=4),
    Sample(temperature=1.5, stream=2**40 + 3, index=7),
    Sample(temperature=1.0, stream=1, slot=9),
    Sample(temperature=2.0, top_k=5, stream=4),
    Sample(temperature=2.0, top_k=1, stream=4),
    Sample(temperature=1.0, top_p=0.3, stream=5),
    Sample(temperature=1.0, top_p=0.0, stream=5),
    Sample(temperature=1.0, min_p=0.2, stream=6),
    Sample(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, stream=7),
]


class SamplingContract(DriverSubject):
    @pytest.fixture
    def showing(self, stepper: Stepper) -> Stepper:
        self.needs(stepper.driver, Feature.PROBE_LOGITS)
        return stepper

    def assert_drawn_as_the_reference_draws(self, stepper: Stepper, samples: Sequence[Sample]) -> None:
        context, other = stepper.context(), stepper.context()
        prompt = self.prompt(stepper.driver, 11)
        request = Request(context, prompt, samples=samples, probes=[Probe(ProbeKind.LOGITS)])
        stranger = Request(other, self.prompt(stepper.driver, 3, seed=9), samples=[Sample(temperature=1.0)])
        for context_ in (context, other):
            stepper.make_room(context_, 11)
        batch = stepper.build([stranger, request])
        result = stepper.collect(stepper.submit_batch([stranger, request], batch))
        assert not result.failed, result.failed
        logits = np.repeat(probe_values(result, 0)[None], len(samples) + 1, 0)
        self._compare(batch, result, logits, first=1)

    def _compare(self, batch: ForwardBatch, result: ForwardResult, logits: Float32, first: int) -> None:
        history = batch.samplers.history.ids
        history = history if history.ndim == 1 else history[:, 0]
        scores = _scores(logits, batch, history)
        slack = self.tolerance * float(logits.std())
        tokens = result.tokens if result.tokens.ndim == 1 else result.tokens[:, 0]
        for sampler in range(first, len(tokens)):
            assert scores[sampler, tokens[sampler]] >= scores[sampler].max() - slack, sampler
            if slack == 0:
                assert tokens[sampler] == scores[sampler].argmax()

    @pytest.mark.parametrize("place", range(len(PLAIN)))
    def test_a_sampler_draws_as_the_reference_does(self, showing: Stepper, place: int) -> None:
        self.assert_drawn_as_the_reference_draws(showing, [PLAIN[place]])

    def test_many_samplers_of_one_row_draw_as_the_reference_does(self, showing: Stepper) -> None:
        self.assert_drawn_as_the_reference_draws(showing, PLAIN)

    @pytest.mark.parametrize(
        "sample",
        [
            Sample(repetition=1.8),
            Sample(presence=3.0),
            Sample(frequency=1.0),
            Sample(temperature=1.0, stream=3, repetition=0.5, presence=0.2, frequency=0.1),
        ],
    )
    def test_penalties_as_in_the_reference(self, showing: Stepper, sample: Sample) -> None:
        self.needs(showing.driver, Feature.PENALTIES)
        favourite = self._favourite(showing)
        history = [favourite, *self.prompt(showing.driver, 5), favourite]
        self.assert_drawn_as_the_reference_draws(showing, [replace(sample, history=history)])
        counts = [3, 1, 1, 0, 2, 1, 1]
        self.assert_drawn_as_the_reference_draws(
            showing, [replace(sample, history=history, history_counts=counts)]
        )

    def _favourite(self, stepper: Stepper) -> int | FromTicket | tuple[int, ...]:
        """What is sampled after the prompt that the comparisons use."""
        prompt = self.prompt(stepper.driver, 11)
        return self.literal(stepper.run([Request(stepper.context(), prompt, samples=[Sample()])]).tokens[0])

    def test_a_penalty_drives_the_favourite_away(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PENALTIES)
        favourite, prompt = self._favourite(stepper), self.prompt(stepper.driver, 11)
        samples = [Sample(presence=1000.0, history=[favourite]), Sample(presence=1000.0)]
        tokens = stepper.run([Request(stepper.context(), prompt, samples=samples)]).tokens
        assert [self.literal(token) == favourite for token in tokens] == [False, True]

    def test_a_penalty_counts_tokens_that_an_open_step_samples(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PENALTIES, Feature.TICKET_TOKENS)
        prompt = self.prompt(stepper.driver, 11)
        source = stepper.submit([Request(stepper.context(), prompt, samples=[Sample()])])
        penalized = Sample(presence=1000.0, history=[FromTicket(source, 0)])
        ticket = stepper.submit([Request(stepper.context(), prompt, samples=[penalized])])
        favourite = self.literal(stepper.collect(source).tokens[0])
        assert self.literal(stepper.collect(ticket).tokens[0]) != favourite

    def test_bias_as_in_the_reference(self, showing: Stepper) -> None:
        self.needs(showing.driver, Feature.LOGIT_BIAS)
        last = showing.driver.capabilities.vocab_size - 1
        samples = [
            Sample(bias=[(1, 1000.0)]),
            Sample(temperature=1.0, stream=4, bias=[(0, 2.0), (last, 3.0), (0, 1.0), (2, -1000.0)]),
        ]
        self.assert_drawn_as_the_reference_draws(showing, samples)

    def test_a_strong_bias_wins(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.LOGIT_BIAS)
        prompt = self.prompt(stepper.driver, 4)
        samples = [Sample(bias=[(1, 1e6)]), Sample(temperature=1.0, bias=[(0, 1e6)])]
        tokens = stepper.run([Request(stepper.context(), prompt, samples=samples)]).tokens
        assert (tokens.reshape(2, -1) == [[1], [0]]).all()

    def test_logit_masks_as_in_the_reference(self, showing: Stepper) -> None:
        self.needs(showing.driver, Feature.LOGIT_MASK)
        vocab_size = showing.driver.capabilities.vocab_size
        samples = [
            Sample(allowed=[vocab_size - 1]),
            Sample(),
            Sample(temperature=1.0, stream=3, allowed=range(0, vocab_size, 3)),
            Sample(temperature=1.0, stream=3, top_p=0.5, top_k=7, allowed=range(31, min(65, vocab_size))),
        ]
        self.assert_drawn_as_the_reference_draws(showing, samples)

    def test_nothing_is_drawn_that_a_logit_mask_forbids(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.LOGIT_MASK)
        allowed = [3, 8]
        samples = [Sample(temperature=5.0, stream=n, allowed=allowed) for n in range(20)]
        tokens = stepper.run(
            [Request(stepper.context(), self.prompt(stepper.driver, 4), samples=samples)]
        ).tokens
        assert set(tokens.ravel().tolist()) == set(allowed)

    def test_a_mask_leaves_temperature_and_filters_in_force(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.LOGIT_MASK)
        samples = [Sample(temperature=3.0, stream=n, top_k=1, allowed=range(10)) for n in range(12)]
        tokens = stepper.run(
            [Request(stepper.context(), self.prompt(stepper.driver, 4), samples=samples)]
        ).tokens
        assert len({tuple(token) for token in tokens.reshape(12, -1).tolist()}) == 1

    def test_a_seeded_request_draws_the_same_wherever_its_row_lies(self, stepper: Stepper) -> None:
        sample = Sample(temperature=1.0, stream=77)
        prompt = self.prompt(stepper.driver, 6)
        alone = stepper.run([Request(stepper.context(), prompt, samples=[sample])]).tokens[0].tolist()
        noise = Sample(temperature=1.0, stream=5)
        for before in (1, 4):
            others = [
                Request(stepper.context(), self.prompt(stepper.driver, n + 1, seed=n), samples=[noise])
                for n in range(before)
            ]
            result = stepper.run([*others, Request(stepper.context(), prompt, samples=[sample])])
            assert result.tokens[-1].tolist() == alone

    @pytest.mark.parametrize(
        "change",
        [{"stream": 78}, {"index": 500}, {"slot": 3}, {"epoch": 1}],
        ids=lambda change: next(iter(change)),
    )
    def test_every_coordinate_of_the_noise_decides(self, stepper: Stepper, change: dict[str, int]) -> None:
        def draws(**fields: int) -> list[list[int]]:
            samples = [
                Sample(row, temperature=5.0, **{"stream": 77, "slot": 0, **fields})  # type: ignore[arg-type]
                for row in range(16)
            ]
            request = Request(stepper.context(), self.prompt(stepper.driver, 16), samples=samples)
            return stepper.run([request]).tokens.tolist()  # type: ignore[no-any-return]

        assert draws() == draws()
        assert draws() != draws(**change)

    def test_at_an_endless_temperature_the_noise_alone_draws_every_column(self, stepper: Stepper) -> None:
        streams, vocab_size = stepper.driver.capabilities.streams, stepper.driver.capabilities.vocab_size
        samples = [Sample(row, temperature=1e5, stream=row) for row in range(24)]
        request = Request(stepper.context(), self.prompt(stepper.driver, 24), samples=samples)
        stepper.make_room(request.context, 24)
        batch = stepper.build([request])
        tokens = stepper.collect(stepper.submit_batch([request], batch)).tokens.reshape(24, streams)
        drawn = batch.samplers
        for column in range(streams):
            slots = column_slots(drawn.slot, column)
            noise = gumbel_noise(drawn.stream, drawn.index, slots, drawn.epoch, vocab_size)
            assert (
                tokens[:, column] == noise.argmax(axis=1)
            ).mean() > 0.9  # the logits still decide near ties

    def test_samplers_of_several_rows_answer_in_their_order(self, stepper: Stepper) -> None:
        prompt = self.prompt(stepper.driver, 5)
        rows = [4, 0, 2, 0]
        tokens = stepper.run([Request(stepper.context(), prompt, samples=[Sample(r) for r in rows])]).tokens
        for row, token in zip(rows, tokens, strict=True):
            single = stepper.run([Request(stepper.context(), prompt[: row + 1], samples=[Sample()])])
            assert single.tokens[0].tolist() == token.tolist()

    def test_tokens_have_a_column_for_each_stream(self, stepper: Stepper) -> None:
        streams = stepper.driver.capabilities.streams
        samples = [Sample(), Sample(temperature=1.0)]
        result = stepper.run([Request(stepper.context(), self.prompt(stepper.driver, 3), samples=samples)])
        assert result.tokens.shape == ((2,) if streams == 1 else (2, streams))

    def test_every_column_of_a_token_decides(self, stepper: Stepper) -> None:
        streams = stepper.driver.capabilities.streams
        if streams == 1:
            pytest.skip("has one stream")
        prompt = self.prompt(stepper.driver, 4)
        expected = self.ask(stepper, stepper.context(), prompt)
        for column in range(streams):
            changed = np.array(prompt)
            changed[1, column] = (changed[1, column] + 1) % stepper.driver.capabilities.vocab_size
            other = [tuple(token) for token in changed.tolist()]
            assert not self.same(self.ask(stepper, stepper.context(), other), expected)


class ProbeContract(DriverSubject):
    def probed(self, stepper: Stepper, *probes: Probe) -> ForwardResult:
        request = Request(stepper.context(), self.prompt(stepper.driver, 7), probes=probes)
        return stepper.run([request])

    def close_to(self, driver: Driver, logits: Float32) -> float:
        """How far values in nats may lie apart."""
        return max(1e-5, 4 * self.tolerance * float(logits.std()))

    def test_logits_are_one_float_for_each_token(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROBE_LOGITS)
        logits = probe_values(self.probed(stepper, Probe(ProbeKind.LOGITS)), 0)
        assert logits.shape == (stepper.driver.capabilities.vocab_size,)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
        assert logits.std() > 0

    def test_probes_do_not_see_what_samplers_change(self, stepper: Stepper) -> None:
        self.needs(
            stepper.driver, Feature.PROBE_LOGITS, Feature.PENALTIES, Feature.LOGIT_BIAS, Feature.LOGIT_MASK
        )
        sample = Sample(presence=5.0, history=self.prompt(stepper.driver, 3), bias=[(1, 9.0)], allowed=[1, 2])
        plain = self.ask(stepper, stepper.context(), self.prompt(stepper.driver, 7))
        request = Request(
            stepper.context(),
            self.prompt(stepper.driver, 7),
            samples=[sample],
            probes=[Probe(ProbeKind.LOGITS)],
        )
        assert self.same(probe_values(stepper.run([request]), 0)[None], plain)

    @pytest.mark.parametrize(("temperature", "k"), [(1.0, 0), (1.0, 5), (0.5, 3), (2.0, 0), (1.0, 1)])
    def test_a_distribution_agrees_with_the_logits(
        self, stepper: Stepper, temperature: float, k: int
    ) -> None:
        self.needs(stepper.driver, Feature.PROBE_LOGITS, Feature.PROBE_DISTRIBUTION)
        result = self.probed(
            stepper, Probe(ProbeKind.LOGITS), Probe(ProbeKind.DISTRIBUTION, temperature=temperature, k=k)
        )
        logits, found, values = probe_values(result, 0), probe_tokens(result, 1), probe_values(result, 1)
        tokens, probabilities = distribution(logits, temperature, k)
        assert len(found) == len(values) == (k or len(logits))
        assert (np.diff(values) <= 0).all()
        np.testing.assert_allclose(values, probabilities, rtol=self.close_to(stepper.driver, logits))
        if self.tolerance == 0:
            np.testing.assert_array_equal(found, tokens)
        expected = distribution(logits, temperature, 0)
        by_token = dict(zip(expected[0].tolist(), expected[1].tolist(), strict=True))
        np.testing.assert_allclose(
            values, [by_token[token] for token in found.tolist()], rtol=self.close_to(stepper.driver, logits)
        )

    def test_log_probabilities_agree_with_the_logits(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROBE_LOGITS, Feature.PROBE_LOGPROBS)
        named = [0, stepper.driver.capabilities.vocab_size - 1, 3, 3]
        result = self.probed(stepper, Probe(ProbeKind.LOGITS), Probe(ProbeKind.LOGPROBS, tokens=named))
        logits = probe_values(result, 0)
        np.testing.assert_allclose(
            probe_values(result, 1), log_softmax(logits)[named], atol=self.close_to(stepper.driver, logits)
        )

    def test_entropy_agrees_with_the_logits(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROBE_LOGITS, Feature.PROBE_ENTROPY)
        result = self.probed(stepper, Probe(ProbeKind.LOGITS), Probe(ProbeKind.ENTROPY))
        logits, found = probe_values(result, 0), probe_values(result, 1)
        assert len(found) == 1
        assert float(found[0]) == pytest.approx(entropy(logits), abs=self.close_to(stepper.driver, logits))

    def test_a_hidden_state_depends_on_the_history(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROBE_HIDDEN)
        first, again = (self.probed(stepper, Probe(ProbeKind.HIDDEN, row=3)) for _ in range(2))
        other = self.probed(stepper, Probe(ProbeKind.HIDDEN, row=4))
        states = [probe_values(result, 0) for result in (first, again, other)]
        assert states[0].shape == (stepper.driver.capabilities.hidden_size,)
        assert self.same(states[0], states[1])
        assert not self.same(states[0], states[2])

    def test_probes_of_many_rows_and_requests_answer_in_their_order(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROBE_LOGITS, Feature.PROBE_ENTROPY, Feature.PROBE_LOGPROBS)
        prompts = [self.prompt(stepper.driver, 5, seed) for seed in range(2)]
        probes = [
            Probe(ProbeKind.ENTROPY, 2),
            Probe(ProbeKind.LOGITS, 4),
            Probe(ProbeKind.LOGPROBS, 0, tokens=[1, 2]),
        ]
        together = stepper.run([Request(stepper.context(), prompt, probes=probes) for prompt in prompts])
        assert np.diff(together.probe_indptr).tolist() == [1, stepper.driver.capabilities.vocab_size, 2] * 2
        for place, prompt in enumerate(prompts):
            alone = stepper.run([Request(stepper.context(), prompt, probes=probes)])
            for probe in range(3):
                assert self.same(probe_values(together, 3 * place + probe), probe_values(alone, probe))

    def columns(self, stepper: Stepper, named: Sequence[int] = ()) -> Float32:
        """[streams, vocab]"""
        result = self.probed(stepper, Probe(ProbeKind.COLUMNS, tokens=named))
        assert not result.failed, result.failed
        return probe_values(result, 0).reshape(stepper.driver.capabilities.streams, -1)

    def test_every_column_is_drawn_from_the_logits_that_are_shown(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROBE_COLUMNS, Feature.PROBE_LOGITS)
        probes = [Probe(ProbeKind.COLUMNS), Probe(ProbeKind.LOGITS)]
        prompt = self.prompt(stepper.driver, 7)
        result = stepper.run([Request(stepper.context(), prompt, samples=[Sample()], probes=probes)])
        capabilities = stepper.driver.capabilities
        columns = probe_values(result, 0).reshape(capabilities.streams, capabilities.vocab_size)
        assert self.same(columns[0], probe_values(result, 1))
        slack = self.tolerance * float(columns.std())
        for logits, token in zip(columns, result.tokens[0].reshape(-1), strict=True):
            assert logits[token] >= logits.max() - slack

    def test_naming_the_most_probable_columns_changes_nothing(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROBE_COLUMNS)
        plain = self.columns(stepper)
        best = plain.argmax(axis=1).tolist()
        for count in range(1, len(best) + 1):
            assert self.same(self.columns(stepper, best[:count]), plain)

    def test_a_named_column_matters_to_those_behind_it_alone(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROBE_COLUMNS)
        best = self.columns(stepper).argmax(axis=1).tolist()
        plain = self.columns(stepper, best)
        for column in range(len(best)):
            named = list(best)
            named[column] = (named[column] + 1) % plain.shape[1]
            assert self.same(self.columns(stepper, named)[: column + 1], plain[: column + 1])


def _scores(
    logits: Float32, batch: ForwardBatch, history: np.ndarray[tuple[int, ...], np.dtype[np.int32]]
) -> Float32:
    """What the reference takes the argmax of."""
    samplers = batch.samplers
    scores = adjusted_logits(logits, samplers, history)
    drawn = samplers.temperature > 0
    temperature = np.where(drawn, samplers.temperature, 1).astype(np.float32)
    scaled = (scores / temperature[:, None]).astype(np.float32)
    kept = filtered_logits(scaled, samplers.top_k, samplers.top_p, samplers.min_p)
    counter = (samplers.stream, samplers.index, samplers.slot, samplers.epoch)
    noisy: Float32 = np.where(drawn[:, None], kept + gumbel_noise(*counter, logits.shape[1]), scores)
    return noisy
