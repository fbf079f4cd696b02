"""The contract of moving pages and slots: copies, swaps and exports carry everything a context has read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pie_core.contracts.driver import Feature
from pie_core.testing.batches import Context, Request, Stepper
from pie_core.testing.driver_contract.subject import DriverSubject

Move = Callable[[int, list[int], list[int]], None]  # group, sources, targets


class MovingContract(DriverSubject):
    def held(self, stepper: Stepper, context: Context, group: int) -> list[int]:
        if stepper.book.is_state(group):
            return [context.slots[group]]
        return list(context.pages[group].values())

    def place(self, stepper: Stepper, context: Context, group: int, targets: list[int]) -> None:
        """Makes the context read its content from these pages."""
        if stepper.book.is_state(group):
            context.slots[group] = targets[0]
        else:
            context.pages[group] = dict(zip(context.pages[group], targets, strict=True))

    def check_that_a_move_carries_everything(
        self, stepper: Stepper, move: Move, expect_source: bool = True
    ) -> None:
        for group in range(len(stepper.book.spaces)):
            context = stepper.context()
            stepper.run([Request(context, self.prompt(stepper.driver, 37))])
            stay = stepper.fork(context)
            expected = self.ask(stepper, stepper.fork(context), self.prompt(stepper.driver, 2, seed=4))
            sources = self.held(stepper, context, group)
            targets = [stepper.book.take(group) for _ in sources][::-1]
            move(group, sources, targets)
            self.place(stepper, context, group, targets)
            tail = self.prompt(stepper.driver, 2, seed=4)
            assert self.same(self.ask(stepper, context, tail), expected)
            if expect_source:
                assert self.same(self.ask(stepper, stay, tail), expected)

    def test_a_copy_carries_everything_and_leaves_the_source(self, stepper: Stepper) -> None:
        self.check_that_a_move_carries_everything(stepper, stepper.driver.copy_pages)

    def test_a_copy_sees_what_an_open_step_writes(self, stepper: Stepper) -> None:
        for group in range(len(stepper.book.spaces)):
            prompt = self.prompt(stepper.driver, 20)
            expected = self.ask(stepper, stepper.context(), prompt)
            context = stepper.context()
            ticket = stepper.submit([Request(context, prompt[:19])])
            targets = [stepper.book.take(group) for _ in self.held(stepper, context, group)]
            stepper.driver.copy_pages(group, self.held(stepper, context, group), targets)
            stepper.collect(ticket)
            self.place(stepper, context, group, targets)
            assert self.same(self.ask(stepper, context, prompt[19:]), expected)

    def test_a_swap_there_and_back_carries_everything(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.SWAP)

        def there_and_back(group: int, sources: list[int], targets: list[int]) -> None:
            host = list(range(len(sources)))[::-1]
            stepper.driver.swap_out(group, sources, host)
            self._spoil(stepper, group, targets)
            stepper.driver.swap_in(group, host, targets)

        self.check_that_a_move_carries_everything(stepper, there_and_back)

    def test_the_last_host_page_is_as_good_as_the_first(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.SWAP)

        def by_the_end(group: int, sources: list[int], targets: list[int]) -> None:
            end = stepper.book.spaces[group].num_host_pages
            host = list(range(end - len(sources), end))
            stepper.driver.swap_out(group, sources, host)
            stepper.driver.swap_in(group, host, targets)

        self.check_that_a_move_carries_everything(stepper, by_the_end)

    def test_an_export_can_be_imported(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.EXPORT)

        def through_bytes(group: int, sources: list[int], targets: list[int]) -> None:
            content = stepper.driver.export_pages(group, sources)
            assert content.dtype == np.uint8
            assert content.shape[0] == len(sources)
            self._spoil(stepper, group, targets)
            stepper.driver.import_pages(
                group, targets, np.frombuffer(content.tobytes(), np.uint8).reshape(content.shape)
            )

        self.check_that_a_move_carries_everything(stepper, through_bytes)

    def test_another_driver_of_the_same_weights_can_import(self, stepper: Stepper) -> None:
        self.needs(stepper.driver, Feature.EXPORT)
        prompt = self.prompt(stepper.driver, 37)
        expected = self.ask(stepper, stepper.context(), prompt)
        context = stepper.context()
        stepper.run([Request(context, prompt[:36])])
        other = Stepper(self.make_driver())
        there = other.context()
        for group in range(len(stepper.book.spaces)):
            sources = self.held(stepper, context, group)
            targets = [other.book.take(group) for _ in sources][::-1]
            other.driver.import_pages(group, targets, stepper.driver.export_pages(group, sources))
            there.pages[group] = dict(zip(context.pages[group], targets, strict=False))
            self.place(other, there, group, targets)
        there.length = context.length
        assert self.same(self.ask(other, there, prompt[36:]), expected)
        other.driver.close()

    @pytest.mark.parametrize("which", [0, 2])
    def test_only_the_named_targets_change(self, stepper: Stepper, which: int) -> None:
        for group in self.rows_groups(stepper.driver):
            size = stepper.book.spaces[group].page_size
            context = stepper.context()
            stepper.run([Request(context, self.prompt(stepper.driver, 3 * size))])
            expected = self.ask(stepper, stepper.fork(context), self.prompt(stepper.driver, 1))
            page = context.pages[group][which]
            free = [stepper.book.take(group) for _ in range(3)]
            stepper.driver.copy_pages(group, [page], free[1:2])
            assert self.same(self.ask(stepper, context, self.prompt(stepper.driver, 1)), expected)

    def _spoil(self, stepper: Stepper, group: int, targets: list[int]) -> None:
        other = stepper.context()
        stepper.run([Request(other, self.prompt(stepper.driver, 3, seed=11))])
        for target in targets:
            stepper.driver.copy_pages(group, self.held(stepper, other, group)[:1], [target])
