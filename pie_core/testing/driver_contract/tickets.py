"""The contract of tickets and drafts: queueing a step before the last one is known never changes a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import cast

import numpy as np
import pytest

from pie_core.contracts.driver import Driver, Feature, PolledDriver
from pie_core.contracts.forward import last_accepted
from pie_core.testing.batches import Context, FromTicket, Request, Sample, Stepper, Token, proposals
from pie_core.testing.driver_contract.subject import DriverSubject

GREEDY = Sample()
SEEDED = Sample(temperature=1.0, stream=31)
BOTH = pytest.mark.parametrize("sample", [GREEDY, SEEDED], ids=["greedy", "seeded"])


class TicketContract(DriverSubject):
    def start(self, stepper: Stepper, sample: Sample, seed: int = 0) -> tuple[Context, Token]:
        """A context with a prompt, and the token that follows."""
        context = stepper.context()
        prompt = self.prompt(stepper.driver, 7, seed)
        result = stepper.run([Request(context, prompt, samples=[sample])])
        return context, self.literal(result.tokens[0])

    def test_tickets_grow_and_are_collected_in_order(self, stepper: Stepper) -> None:
        contexts = [stepper.context() for _ in range(2)]
        prompts = [self.prompt(stepper.driver, 5, seed) for seed in range(2)]
        alone = [stepper.run([Request(stepper.context(), p, samples=[GREEDY])]).tokens for p in prompts]
        tickets = [
            stepper.submit([Request(*pair, samples=[GREEDY])]) for pair in zip(contexts, prompts, strict=True)
        ]
        assert tickets[0] < tickets[1]
        results = [stepper.collect(ticket) for ticket in tickets]
        assert [result.ticket for result in results] == tickets
        for result, tokens in zip(results, alone, strict=True):
            np.testing.assert_array_equal(result.tokens, tokens)

    def test_a_driver_that_is_asked_says_when_a_step_is_over(self, stepper: Stepper) -> None:
        if not stepper.driver.capabilities.can_poll:
            pytest.skip("the driver is waited for")
        driver = cast(PolledDriver, stepper.driver)
        prompt = self.prompt(driver, 5)
        expected = stepper.run([Request(stepper.context(), prompt, samples=[GREEDY])]).tokens
        ticket = stepper.submit([Request(stepper.context(), prompt, samples=[GREEDY])])
        end = monotonic() + 60
        while not driver.is_done(ticket):
            assert monotonic() < end, "a step of five rows"
        np.testing.assert_array_equal(stepper.collect(ticket).tokens, expected)

    @BOTH
    @pytest.mark.parametrize("by_request", [False, True], ids=["by-sampler", "by-last-accepted"])
    def test_a_token_of_an_open_step_is_as_good_as_its_value(
        self, stepper: Stepper, sample: Sample, by_request: bool
    ) -> None:
        self.needs(stepper.driver, Feature.TICKET_TOKENS)
        context, first = self.start(stepper, sample)
        expected = self.generated(stepper, stepper.fork(context), first, 6, sample)
        other, _ = self.start(
            stepper, SEEDED, seed=3
        )  # stands first in the batch, so that rows and requests differ
        token: Token = first
        found, ticket = [], None
        for _ in range(6):
            following = stepper.submit(
                [
                    Request(other, [1] if isinstance(first, int) else [first]),
                    Request(context, [token], samples=[sample]),
                ]
            )
            token = FromTicket(following, last_accepted(1) if by_request else 0)
            if ticket is not None:
                found.append(self.literal(stepper.collect(ticket).tokens[0]))
            ticket = following
        assert ticket is not None
        found.append(self.literal(stepper.collect(ticket).tokens[0]))
        assert found == expected

    def drafted(
        self, stepper: Stepper, context: Context, first: Token, drafts: Sequence[Token], sample: Sample
    ) -> list[Token]:
        """The tokens that a step with drafts is good for."""
        tokens = [first, *drafts]
        samples = [replace(sample, row=row) for row in range(len(tokens))]
        result = stepper.run([Request(context, tokens, drafts=len(drafts), samples=samples)])
        return [self.literal(token) for token in result.tokens[: int(result.accepted[0]) + 1]]

    @BOTH
    @pytest.mark.parametrize("right", [0, 1, 3, 4])
    def test_drafts_are_accepted_up_to_the_first_wrong_one(
        self, stepper: Stepper, sample: Sample, right: int
    ) -> None:
        self.needs(stepper.driver, Feature.DRAFTS)
        context, first = self.start(stepper, sample)
        expected = self.generated(stepper, stepper.fork(context), first, 9, sample)
        drafts = expected[:4]
        if right < 4:
            drafts[right] = self.other_token(stepper.driver, drafts[right])
        found = self.drafted(stepper, context, first, drafts, sample)
        assert found == expected[: right + 1]
        rest = self.generated(stepper, context, found[-1], 9 - len(found), sample)
        assert found + rest == expected

    def test_drafts_of_some_requests_leave_the_others_alone(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.DRAFTS)
        started = [self.start(stepper, GREEDY, seed) for seed in range(3)]
        expected = [
            self.generated(stepper, stepper.fork(context), first, 4, GREEDY) for context, first in started
        ]
        wrong = self.other_token(stepper.driver, expected[2][0])
        drafts: list[list[Token]] = [expected[0][:2], [], [wrong]]
        requests = [
            Request(
                context,
                [first, *drafts[place]],
                drafts=len(drafts[place]),
                samples=[Sample(row) for row in range(1 + len(drafts[place]))],
            )
            for place, (context, first) in enumerate(started)
        ]
        result = stepper.run(requests)
        assert result.accepted.tolist() == [2, 0, 0]
        tokens = [self.literal(token) for token in result.tokens]
        assert tokens[:3] == expected[0][:3]
        assert tokens[3] == expected[1][0]
        assert tokens[4] == expected[2][0]

    def test_a_draft_behind_a_row_without_a_sampler_is_not_accepted(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.DRAFTS)
        context, first = self.start(stepper, GREEDY)
        expected = self.generated(stepper, stepper.fork(context), first, 2, GREEDY)
        result = stepper.run([Request(context, [first, *expected], drafts=2, samples=[Sample(1), Sample(2)])])
        assert result.accepted.tolist() == [0]

    def test_the_first_sampler_of_a_row_decides_about_the_draft_behind_it(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.DRAFTS)
        context, first = self.start(stepper, GREEDY)
        expected = self.generated(stepper, stepper.fork(context), first, 3, GREEDY)
        wild = [Sample(row, temperature=100.0, stream=row) for row in (0, 0, 1, 1)]
        samples = [Sample(0), *wild[:2], Sample(1), *wild[2:], Sample(2)]
        result = stepper.run([Request(context, [first, *expected[:2]], drafts=2, samples=samples)])
        assert result.accepted.tolist() == [2]
        assert [self.literal(result.tokens[place]) for place in (0, 3, 6)] == expected

    @BOTH
    @pytest.mark.parametrize("right", [0, 1, 3])
    def test_a_step_may_follow_drafts_whose_fate_is_open(
        self, stepper: Stepper, sample: Sample, right: int
    ) -> None:
        self.needs(stepper.driver, Feature.DRAFTS, Feature.TICKET_TOKENS, Feature.TICKET_LENGTHS)
        context, first = self.start(stepper, sample)
        expected = self.generated(stepper, stepper.fork(context), first, 12, sample)
        drafts = expected[:3]
        if right < 3:
            drafts[right] = self.other_token(stepper.driver, drafts[right])
        samples = [replace(sample, row=row) for row in range(4)]
        other, _ = self.start(stepper, sample, seed=5)
        one = stepper.submit(
            [Request(other, [first]), Request(context, [first, *drafts], drafts=3, samples=samples)]
        )
        two = stepper.submit([Request(context, [FromTicket(one, last_accepted(1))], samples=[sample])])
        result = stepper.collect(one)
        found = [self.literal(token) for token in result.tokens[: int(result.accepted[1]) + 1]]
        found.append(self.literal(stepper.collect(two).tokens[0]))
        assert found == expected[: right + 2]
        rest = self.generated(stepper, context, found[-1], 12 - len(found), sample)
        assert found + rest == expected

    def test_tokens_behind_a_rejected_draft_are_not_penalized(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.DRAFTS, Feature.TICKET_TOKENS, Feature.TICKET_LENGTHS)
        self.needs(stepper.driver, Feature.PENALTIES, Feature.LOGIT_BIAS)
        context, first = self.start(stepper, GREEDY)
        sampled, favourite = self.generated(stepper, stepper.fork(context), first, 2, GREEDY)
        if sampled == favourite or not isinstance(favourite, int):
            pytest.skip("needs two different tokens of one column")
        wrong = self.other_token(stepper.driver, sampled)
        behind = Sample(1, bias=[(favourite, 1e6)])  # draws what the next step would, were it not penalized
        one = stepper.submit([Request(context, [first, wrong], drafts=1, samples=[Sample(0), behind])])
        penalized = Sample(presence=1000.0, history=[FromTicket(one, 0), FromTicket(one, 1)])
        two = stepper.submit([Request(context, [FromTicket(one, last_accepted(0))], samples=[penalized])])
        assert stepper.collect(one).tokens.tolist() == [sampled, favourite]
        assert stepper.collect(two).tokens.tolist() == [favourite]

    def test_as_many_drafts_are_proposed_as_asked_for_at_most(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.PROPOSALS)
        prompts = [self.prompt(stepper.driver, 6, seed) for seed in range(3)]
        wanted = [3, 0, 1]
        requests = [
            Request(stepper.context(), prompt, samples=[GREEDY], proposals=count)
            for prompt, count in zip(prompts, wanted, strict=True)
        ]
        result = stepper.run(requests)
        given = np.diff(result.draft_indptr)
        assert len(given) == 3
        assert (given <= wanted).all()
        assert (result.draft_tokens >= 0).all()
        assert (result.draft_tokens < stepper.driver.capabilities.vocab_size).all()

    @BOTH
    def test_proposals_never_change_the_tokens(self, stepper: Stepper, sample: Sample) -> None:
        self.needs(stepper.driver, Feature.DRAFTS, Feature.PROPOSALS)
        context, first = self.start(stepper, sample)
        expected = self.generated(stepper, stepper.fork(context), first, 24, sample)
        found: list[Token] = []
        drafts: list[Token] = []
        token = first
        while len(found) < 24:
            tokens = [token, *drafts]
            samples = [replace(sample, row=row) for row in range(len(tokens))]
            result = stepper.run([Request(context, tokens, drafts=len(drafts), samples=samples, proposals=3)])
            found += [self.literal(t) for t in result.tokens[: int(result.accepted[0]) + 1]]
            token, drafts = found[-1], [self.literal(t) for t in proposals(result, 0)]
        assert found[:24] == expected

    def test_some_proposal_is_right(self, driver: Driver, stepper: Stepper) -> None:
        self.needs(driver, Feature.DRAFTS, Feature.PROPOSALS)
        accepted = 0
        for seed in range(12):
            context, prompt = stepper.context(), self.prompt(driver, 6, seed)
            result = stepper.run([Request(context, prompt, samples=[GREEDY], proposals=2)])
            drafts = [self.literal(token) for token in proposals(result, 0)]
            found = self.drafted(stepper, context, self.literal(result.tokens[0]), drafts, GREEDY)
            accepted += len(found) - 1
        assert accepted > 0
