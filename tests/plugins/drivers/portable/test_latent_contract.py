"""The driver contract over the portable driver on a model with latent rows and an indexer."""

from __future__ import annotations

from pathlib import Path

import pytest

from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import Mask, Request, Stepper
from tests.plugins.drivers.checkpoint_contract import CheckpointContract
from tests.plugins.models.reference import ARCHITECTURES, CONFIGS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glm5")
    write_checkpoint(folder, ARCHITECTURES["glm5"], CONFIGS["glm5"])
    return folder


class TestPortableWithLatentRows(CheckpointContract):
    def test_a_mask_for_one_group_leaves_the_others_alone(self, masking: Stepper) -> None:
        """Rows that an indexer does not see cannot be chosen, so hiding them from it hides them from attention."""
        prompt, visible = self.prompt(masking.driver, 24), [(0, 3), (7, 24)]
        plain, everywhere, attention, indexer = (
            self.ask(
                masking, masking.context(), prompt, masks=[Mask(23, visible, group=group) for group in groups]
            )
            for groups in ([], [-1], [0], [1])
        )
        assert self.same(indexer, everywhere)
        assert not any(self.same(plain, other) for other in (everywhere, attention))
        assert not self.same(attention, everywhere)

    def test_chosen_rows_that_attention_has_given_up_are_not_read(self, masking: Stepper) -> None:
        """As if they were hidden from attention and not from the indexer, whose choice is the same."""
        size = masking.book.spaces[0].page_size
        prompt, length = self.prompt(masking.driver, 3 * size), 3 * size + 1
        whole = masking.context()
        masking.run([Request(whole, prompt)])
        holed, hiding = masking.fork(whole), masking.fork(whole)
        for page in (0, 1):
            del holed.pages[0][page]
        mask = Mask(0, [(2 * size, length)], group=0)
        expected = self.ask(masking, hiding, [prompt[0]], masks=[mask])
        assert self.same(self.ask(masking, holed, [prompt[0]]), expected)
        assert not self.same(self.ask(masking, whole, [prompt[0]]), expected)
