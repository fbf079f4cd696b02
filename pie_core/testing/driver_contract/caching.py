"""The contract of pages, slots, positions and batches: what a context has read decides, and nothing else does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import StateTable
from pie_core.testing.batch_checks import broken_promises
from pie_core.testing.batches import Request, Stepper
from pie_core.testing.driver_contract.subject import DriverSubject


class CachingContract(DriverSubject):
    def test_the_capabilities_make_sense(self, driver: Driver) -> None:
        capabilities = driver.capabilities
        assert capabilities == driver.capabilities
        assert capabilities.vocab_size > 1
        assert capabilities.max_in_flight >= 1
        assert capabilities.position_axes in (1, 3)
        assert capabilities.weights_revision
        assert len({space.group.name for space in capabilities.cache}) == len(capabilities.cache)
        for space in capabilities.cache:
            assert space.num_pages > 0
            assert space.group.unit_bytes > 0
            assert (space.group.window is not None) == (space.group.kind == "window")
            assert space.page_size == 1 or space.group.kind != "state"

    def test_a_second_driver_of_the_same_weights_answers_alike(self, stepper: Stepper) -> None:
        prompt = self.prompt(stepper.driver, 9)
        other = Stepper(self.make_driver())
        assert self.same(
            self.ask(stepper, stepper.context(), prompt), self.ask(other, other.context(), prompt)
        )
        assert other.driver.capabilities.weights_revision == stepper.driver.capabilities.weights_revision
        other.driver.close()

    @pytest.mark.parametrize("changed", [0, 7, 16, 20])
    def test_every_token_of_the_history_decides(self, stepper: Stepper, changed: int) -> None:
        prompt = self.prompt(stepper.driver, 21)
        other = [*prompt]
        other[changed] = self.other_token(stepper.driver, other[changed])
        one, two = (self.ask(stepper, stepper.context(), tokens) for tokens in (prompt, other))
        assert not self.same(one, two)

    @pytest.mark.parametrize("chunks", [(23,), (1,) * 23, (5, 1, 16, 1), (16, 7), (15, 2, 6)])
    def test_a_prompt_in_chunks_is_the_whole_prompt(self, stepper: Stepper, chunks: tuple[int, ...]) -> None:
        prompt = self.prompt(stepper.driver, 24)
        whole = self.ask(stepper, stepper.context(), prompt)
        context, start = stepper.context(), 0
        for size in chunks:
            stepper.run([Request(context, prompt[start : start + size])])
            start += size
        assert self.same(self.ask(stepper, context, prompt[23:]), whole)

    def test_the_rows_of_one_step_answer_as_steps_of_one_row(self, stepper: Stepper) -> None:
        prompt = self.prompt(stepper.driver, 6)
        together = self.ask(stepper, stepper.context(), prompt, rows=range(6))
        context = stepper.context()
        for row, token in enumerate(prompt):
            assert self.same(self.ask(stepper, context, [token]), together[row : row + 1])

    def test_the_other_requests_of_a_batch_do_not_matter(self, stepper: Stepper) -> None:
        prompts = [self.prompt(stepper.driver, count, seed=count) for count in (1, 18, 5, 33, 2)]
        alone = [self.ask(stepper, stepper.context(), prompt) for prompt in prompts]
        contexts = [stepper.context() for _ in prompts]
        stepper.run([Request(contexts[3], prompts[3][:-1])])  # so that prefill and decode stand side by side
        rest = [*prompts[:3], prompts[3][-1:], prompts[4]]
        order = [3, 0, 4, 2, 1]
        answers = self.ask_all(stepper, [Request(contexts[place], rest[place]) for place in order])
        for place, answer in zip(order, answers, strict=True):
            assert self.same(answer, alone[place])

    def test_where_pages_lie_does_not_matter(self, stepper: Stepper) -> None:
        prompt = self.prompt(stepper.driver, 40)
        expected = self.ask(stepper, stepper.context(), prompt)
        stepper.book.shuffle(3)
        context = stepper.context()
        stepper.run([Request(context, prompt[:17])])
        assert self.same(self.ask(stepper, context, prompt[17:]), expected)

    def test_a_wrong_page_changes_the_answer(self, stepper: Stepper) -> None:
        for group in self.rows_groups(stepper.driver):
            rows = (
                2 * stepper.book.spaces[group].page_size + 1
            )  # the next row sees page 1, however small the window
            prompt, others = self.prompt(stepper.driver, rows), self.prompt(stepper.driver, rows, seed=1)
            right, other = stepper.context(), stepper.context()
            stepper.run([Request(right, prompt), Request(other, others)])
            expected = self.ask(stepper, stepper.fork(right), [prompt[0]])
            right.pages[group][1] = other.pages[group][1]
            assert not self.same(self.ask(stepper, right, [prompt[0]]), expected)

    @pytest.mark.parametrize("place", range(4))
    def test_the_page_size_does_not_matter(self, stepper: Stepper, place: int) -> None:
        if place >= len(self.page_sizes):
            pytest.skip("has no page size to choose")
        prompt = self.prompt(stepper.driver, 37)
        expected = self.ask(stepper, stepper.context(), prompt)
        other = Stepper(self.make_driver(page_size=self.page_sizes[place]))
        context = other.context()
        other.run([Request(context, prompt[:20])])
        assert self.same(self.ask(other, context, prompt[20:]), expected)
        other.driver.close()

    def test_rows_behind_the_length_are_not_read(self, stepper: Stepper) -> None:
        prompt = self.prompt(stepper.driver, 20)
        expected = self.ask(stepper, stepper.context(), prompt)
        context = stepper.context()
        stepper.run([Request(context, prompt[:13])])
        kept = [*context.slots]
        stepper.run([Request(context, self.prompt(stepper.driver, 9, seed=5), state_rows=[])])
        context.length, context.slots = 13, kept
        assert self.same(self.ask(stepper, context, prompt[13:]), expected)

    def test_pages_that_a_context_gave_up_are_not_read(self, stepper: Stepper) -> None:
        for group in self.rows_groups(stepper.driver):
            size = stepper.book.spaces[group].page_size
            prompt = self.prompt(stepper.driver, 3 * size + 1)
            full = stepper.context()
            stepper.run([Request(full, prompt)])
            holed = [stepper.fork(full), stepper.fork(full)]
            expected = self.ask(stepper, stepper.fork(full), [prompt[0]])
            for context in holed:
                del context.pages[group][2]
            first = self.ask(stepper, holed[0], [prompt[0]])
            self._overwrite(stepper, group, full.pages[group][2])
            second = self.ask(stepper, holed[1], [prompt[0]])
            assert self.same(first, second)
            assert not self.same(first, expected)

    def _overwrite(self, stepper: Stepper, group: int, page: int) -> None:
        other = stepper.context()
        stepper.run([Request(other, self.prompt(stepper.driver, 64, seed=8))])
        stepper.driver.copy_pages(group, [other.pages[group][0]], [page])

    def test_pages_behind_the_window_may_go(self, stepper: Stepper) -> None:
        windows = self.groups(stepper.driver, "window")
        if not windows:
            pytest.skip("has no window group")
        for group in windows:
            space = stepper.book.spaces[group]
            window = space.group.window or 0
            prompt = self.prompt(stepper.driver, window + 3 * space.page_size)
            context = stepper.context()
            stepper.run([Request(context, prompt)])
            expected = self.ask(stepper, stepper.fork(context), [prompt[0]])
            oldest = context.length - window + 1  # what the next row still reads
            for logical in range(oldest // space.page_size):
                del context.pages[group][logical]
            assert self.same(self.ask(stepper, context, [prompt[0]]), expected)

    def test_a_fork_goes_on_as_its_parent_would(self, stepper: Stepper) -> None:
        prompt, tail = self.prompt(stepper.driver, 21), self.prompt(stepper.driver, 20, seed=2)
        parent = stepper.context()
        stepper.run([Request(parent, prompt)])
        children = [stepper.fork(parent) for _ in range(3)]
        strangers = [self.other_token(stepper.driver, token) for token in tail]
        answers = self.ask_all(
            stepper,
            [
                Request(parent, tail),
                Request(children[0], strangers),
                Request(children[1], tail),
                Request(children[2], tail[:1]),
            ],
        )
        assert self.same(answers[0], answers[2])
        assert not self.same(answers[0], answers[1])
        assert self.same(self.ask(stepper, children[2], tail[1:]), answers[0])
        assert self.same(self.ask(stepper, stepper.context(), prompt + tail), answers[0])

    def test_requests_that_share_their_first_pages_answer_alike_grouped_or_not(
        self, stepper: Stepper
    ) -> None:
        sizes = [
            stepper.book.spaces[group].page_size for group in self.groups(stepper.driver, "paged", "latent")
        ]
        if not sizes:
            pytest.skip("keeps no rows for as long as a context lives")
        size = math.lcm(*sizes)
        parent, stranger = stepper.context(), stepper.context()
        stepper.run([Request(parent, self.prompt(stepper.driver, 2 * size + 1))])
        stepper.run([Request(stranger, self.prompt(stepper.driver, size + 3, seed=1))])
        close = [stepper.fork(parent) for _ in range(3)]
        stepper.run(
            [Request(each, self.prompt(stepper.driver, 1 + size * i, seed=i)) for i, each in enumerate(close)]
        )
        tails = [self.prompt(stepper.driver, rows, seed=9) for rows in (1, 1, 2, 1, 1)]
        contexts = [close[0], stranger, parent, *close[1:]]
        answers = []
        for groups in ([], [(2, 5, 2 * size)], [(3, 5, size)]):
            forks = [stepper.fork(each) for each in contexts]
            requests = [
                self.asking(Request(each, tail), stepper.driver)
                for each, tail in zip(forks, tails, strict=True)
            ]
            for each in requests:
                stepper.make_room(each.context, len(each.tokens))
            batch = stepper.grouped(requests, groups)
            assert broken_promises(batch, stepper.book.spaces) == []
            result = stepper.collect(stepper.submit_batch(requests, batch))
            answers.append([self.answer(stepper.driver, result, place, 1) for place in range(len(contexts))])
        for others in answers[1:]:
            assert all(self.same(one, other) for one, other in zip(answers[0], others, strict=True))

    def test_positions_decide_and_kv_indexes_do_not(self, stepper: Stepper) -> None:
        if not self.rows_groups(stepper.driver):
            pytest.skip("keeps no KV rows")
        prompt = self.prompt(stepper.driver, 8)
        plain = self.ask(stepper, stepper.context(), prompt)
        given = self.ask(stepper, stepper.context(), prompt, positions=range(8))
        stretched = self.ask(stepper, stepper.context(), prompt, positions=[0, 1, 2, 3, 9, 10, 11, 12])
        assert self.same(plain, given)
        assert not self.same(plain, stretched)

    def test_positions_reach_later_steps_through_what_was_written(self, stepper: Stepper) -> None:
        if not self.rows_groups(stepper.driver):
            pytest.skip("keeps no KV rows")
        prompt, answers = self.prompt(stepper.driver, 8), []
        for positions in (range(7), [0, 1, 2, 3, 3, 3, 4]):
            context = stepper.context()
            stepper.run([Request(context, prompt[:7], positions=positions)])
            answers.append(self.ask(stepper, context, prompt[7:], positions=[20]))
        assert not self.same(answers[0], answers[1])

    def test_each_of_three_position_axes_decides(self, stepper: Stepper) -> None:
        if stepper.driver.capabilities.position_axes != 3:
            pytest.skip("has one position axis")
        prompt = self.prompt(stepper.driver, 6)
        given = np.repeat(np.arange(6)[:, None], 3, 1)
        expected = self.ask(stepper, stepper.context(), prompt)
        for axis in range(3):
            positions = given.copy()
            positions[3:, axis] += 5
            changed = self.ask(stepper, stepper.context(), prompt, positions=positions.tolist())
            assert not self.same(changed, expected)
        assert self.same(self.ask(stepper, stepper.context(), prompt, positions=given.tolist()), expected)

    def test_a_request_may_ask_for_nothing(self, stepper: Stepper) -> None:
        context = stepper.context()
        result = stepper.run([Request(context, self.prompt(stepper.driver, 3))])
        assert len(result.tokens) == 0
        assert result.probe_indptr.tolist() == [0]
        assert result.accepted.tolist() == [0]
        assert result.failed == {}
        assert result.busy_s >= 0

    def test_state_is_read_from_one_slot_and_written_to_others(self, stepper: Stepper) -> None:
        if not self.groups(stepper.driver, "state"):
            pytest.skip("keeps no state")
        prompt = self.prompt(stepper.driver, 10)
        context = stepper.context()
        stepper.run([Request(context, prompt)])
        forks = [stepper.fork(context) for _ in range(2)]
        first = self.ask(stepper, forks[0], prompt[:3])
        assert self.same(self.ask(stepper, forks[1], prompt[:3]), first)

    def test_the_state_after_any_row_can_be_kept(self, stepper: Stepper) -> None:
        if not self.groups(stepper.driver, "state"):
            pytest.skip("keeps no state")
        prompt = self.prompt(stepper.driver, 8)
        expected = self.ask(stepper, stepper.context(), prompt)
        context = stepper.context()
        stepper.make_room(context, 8)
        batch = stepper.build([Request(context, prompt, state_rows=[4, 7])])
        stepper.driver.collect(stepper.driver.submit(batch))
        for group, table in enumerate(batch.cache):
            if isinstance(table, StateTable):
                context.slots[group] = int(table.out_slots[0])
        context.length = 5
        assert self.same(self.ask(stepper, context, prompt[5:]), expected)

    def test_the_slot_that_state_is_read_from_decides(self, stepper: Stepper) -> None:
        if not self.groups(stepper.driver, "state"):
            pytest.skip("keeps no state")
        prompt = self.prompt(stepper.driver, 8)
        context = stepper.context()
        stepper.run([Request(context, prompt)])
        fresh = stepper.fork(context)
        fresh.slots = [-1] * len(fresh.slots)
        one, two = self.ask_all(stepper, [Request(context, prompt[:1]), Request(fresh, prompt[:1])])
        assert not self.same(one, two)
