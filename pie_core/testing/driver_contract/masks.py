"""The contract of attention masks: what is hidden does not matter, on prefill and on decode, for each cache group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pie_core.contracts.driver import Feature
from pie_core.testing.batches import Mask, Request, Stepper, Token
from pie_core.testing.driver_contract.subject import Answer, DriverSubject

HIDDEN = 5  # the KV index that the tests hide


class MaskContract(DriverSubject):
    @pytest.fixture
    def masking(self, stepper: Stepper) -> Stepper:
        self.needs(stepper.driver, Feature.ATTENTION_MASK)
        if self.groups(stepper.driver, "state"):
            pytest.skip("what recurrent state has taken in cannot be hidden")
        return stepper

    def _pair(self, stepper: Stepper, count: int = 12) -> tuple[list[Token], list[Token]]:
        """Two prompts that differ at HIDDEN only."""
        prompt = self.prompt(stepper.driver, count)
        other = [*prompt]
        other[HIDDEN] = self.other_token(stepper.driver, other[HIDDEN])
        return prompt, other

    def _without_hidden(self, start: int, end: int) -> list[Mask]:
        """Masks of the rows that feed KV indexes start to end."""
        return [Mask(row, [(0, HIDDEN), (HIDDEN + 1, start + row + 1)]) for row in range(end - start)]

    def _masked_answer(
        self, stepper: Stepper, tokens: Sequence[Token], chunks: Sequence[int], masked: bool = True
    ) -> Answer:
        context, start = stepper.context(), 0
        for size in chunks:
            end = start + size
            masks = self._without_hidden(start, end) if masked and start > HIDDEN else []
            if start <= HIDDEN < end and masked:
                masks = [mask for mask in self._without_hidden(start, end) if start + mask.row > HIDDEN]
            answer = self.ask(stepper, context, tokens[start:end], masks=masks)
            start = end
        return answer

    @pytest.mark.parametrize("chunks", [(12,), (8, 4), (6, 1, 1, 1, 1, 1, 1), (11, 1)])
    def test_what_every_later_row_hides_does_not_matter(
        self, masking: Stepper, chunks: tuple[int, ...]
    ) -> None:
        one, other = self._pair(masking)
        assert self.same(
            self._masked_answer(masking, one, chunks), self._masked_answer(masking, other, chunks)
        )
        assert not self.same(
            self._masked_answer(masking, one, chunks), self._masked_answer(masking, one, chunks, False)
        )

    def test_a_masked_prompt_in_chunks_is_the_whole_one(self, masking: Stepper) -> None:
        prompt, _ = self._pair(masking)
        whole = self._masked_answer(masking, prompt, (12,))
        assert self.same(self._masked_answer(masking, prompt, (3, 5, 1, 3)), whole)

    def test_one_masked_row_of_a_prompt_changes_what_follows(self, masking: Stepper) -> None:
        prompt, answers = self.prompt(masking.driver, 8), []
        for masks in ([], [Mask(3, [(2, 4)])]):
            context = masking.context()
            masking.run([Request(context, prompt[:7], masks=masks)])
            answers.append(self.ask(masking, context, prompt[7:]))
        assert not self.same(answers[0], answers[1])

    def test_a_decode_row_obeys_its_mask(self, masking: Stepper) -> None:
        prompt = self.prompt(masking.driver, 9)
        context = masking.context()
        masking.run([Request(context, prompt[:8])])
        forks = [masking.fork(context) for _ in range(3)]
        plain, everything, some = self.ask_all(
            masking,
            [
                Request(forks[0], prompt[8:]),
                Request(forks[1], prompt[8:], masks=[Mask(0, [(0, 9)])]),
                Request(forks[2], prompt[8:], masks=[Mask(0, [(0, 2), (6, 9)])]),
            ],
        )
        assert self.same(plain, everything)
        assert not self.same(plain, some)

    def test_a_mask_does_not_reach_behind_the_window(self, masking: Stepper) -> None:
        windows = [
            masking.book.spaces[group].group.window or 0 for group in self.groups(masking.driver, "window")
        ]
        if not windows:
            pytest.skip("has no window group")
        rows = max(windows) + 5
        prompt = self.prompt(masking.driver, rows)
        plain = self.ask(masking, masking.context(), prompt)
        everything = [Mask(row, [(0, row + 1)]) for row in range(rows)]
        assert self.same(self.ask(masking, masking.context(), prompt, masks=everything), plain)

    def test_a_mask_is_intersected_with_causality(self, masking: Stepper) -> None:
        prompt = self.prompt(masking.driver, 6)
        plain = self.ask(masking, masking.context(), prompt, rows=range(6))
        masks = [Mask(row, [(0, 6)]) for row in range(6)]
        assert self.same(self.ask(masking, masking.context(), prompt, rows=range(6), masks=masks), plain)

    def test_a_row_may_look_ahead_where_it_is_told_to(self, masking: Stepper) -> None:
        self.needs(masking.driver, Feature.NONCAUSAL_MASK)
        prompt = self.prompt(masking.driver, 6)
        other = [*prompt[:5], self.other_token(masking.driver, prompt[5])]
        masks = [Mask(row, [(0, 6)], causal=False) for row in range(6)]
        one, two = (
            self.ask(masking, masking.context(), tokens, rows=[0], masks=masks) for tokens in (prompt, other)
        )
        plain = self.ask(masking, masking.context(), prompt, rows=[0])
        assert not self.same(one, two)
        assert not self.same(one, plain)

    def test_looking_ahead_over_everything_leaves_the_last_row_of_one_as_it_is(
        self, masking: Stepper
    ) -> None:
        self.needs(masking.driver, Feature.NONCAUSAL_MASK)
        prompt = self.prompt(masking.driver, 1)
        masks = [Mask(0, [(0, 1)], causal=False)]
        plain = self.ask(masking, masking.context(), prompt)
        assert self.same(self.ask(masking, masking.context(), prompt, masks=masks), plain)

    def test_what_lies_past_the_end_of_a_mask_is_hidden(self, masking: Stepper) -> None:
        prompt = self.prompt(masking.driver, 9)
        ended = [Mask(8, [(0, 7)])]
        spelled_out = [Mask(8, [(0, 7), (9, 9)])]
        one, two = (
            self.ask(masking, masking.context(), prompt, masks=masks) for masks in (ended, spelled_out)
        )
        assert self.same(one, two)
        assert not self.same(one, self.ask(masking, masking.context(), prompt))

    def test_a_mask_for_one_group_leaves_the_others_alone(self, masking: Stepper) -> None:
        groups = self.rows_groups(masking.driver)
        prompt, visible = self.prompt(masking.driver, 9), [(0, 3), (7, 9)]
        answers = [self.ask(masking, masking.context(), prompt)]
        for group in [-1, *groups] if len(groups) > 1 else groups:
            answers.append(
                self.ask(masking, masking.context(), prompt, masks=[Mask(8, visible, group=group)])
            )
        for place, answer in enumerate(answers):
            assert not any(self.same(answer, other) for other in answers[:place])
        spelled = [Mask(8, visible, group=group) for group in groups]
        everywhere = [Mask(8, visible)]
        one, two = (
            self.ask(masking, masking.context(), prompt, masks=masks) for masks in (spelled, everywhere)
        )
        assert self.same(one, two)

    def test_an_entry_for_a_group_holds_before_the_one_for_all(self, masking: Stepper) -> None:
        prompt = self.prompt(masking.driver, 9)
        groups = self.rows_groups(masking.driver)
        own = [Mask(8, [(0, 9)], group=group) for group in groups]
        overridden = self.ask(masking, masking.context(), prompt, masks=[Mask(8, [(0, 2)]), *own])
        assert self.same(overridden, self.ask(masking, masking.context(), prompt))

    def test_masks_of_one_request_leave_the_others_alone(self, masking: Stepper) -> None:
        prompts = [self.prompt(masking.driver, 7, seed) for seed in range(3)]
        alone = [self.ask(masking, masking.context(), prompt) for prompt in prompts]
        masks = [Mask(row, [(row, row + 1)]) for row in range(7)]
        requests = [
            Request(masking.context(), prompt, masks=masks if place == 1 else [])
            for place, prompt in enumerate(prompts)
        ]
        answers = self.ask_all(masking, requests)
        assert [self.same(*pair) for pair in zip(answers, alone, strict=True)] == [True, False, True]
