"""Requests that read a prefix together answer as if each read it by itself, and read it once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from pie_core.contracts.forward import ProbeKind
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import Probe, Request, Stepper, probe_values
from pie_plugins.drivers.portable import attention
from pie_plugins.drivers.portable.shared_rows import Part, SharedRows, over_shared
from pie_plugins.models.llama import DECLARATION
from tests.core.engine.stepping import RANDOM, SteppedEngine
from tests.plugins.models.reference import portable, tiny

PROMPT = [(7 * i) % 97 for i in range(25)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, DECLARATION, tiny("llama"))
    return path


@pytest.fixture
def read_together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were, at each time."""
    found: list[int] = []

    def noted(shared: SharedRows, rows: Tensor, q: Tensor, scale: float) -> Part:
        found.append(len(shared.slots))
        return over_shared(shared, rows, q, scale)

    monkeypatch.setattr(attention, "over_shared", noted)
    return found


def answers(stepper: Stepper, groups: list[tuple[int, int, int]]) -> np.ndarray:
    """Logits of five contexts, of which the second to the fourth are forks of one."""
    parent, stranger, last = stepper.context(), stepper.context(), stepper.context()
    stepper.run([Request(parent, PROMPT), Request(stranger, PROMPT[:9]), Request(last, PROMPT[3:])])
    forks = [stepper.fork(parent) for _ in range(3)]
    tails = [[5], [6], [7, 8, 9], [10], [11, 12]]
    requests = [
        Request(context, tail, probes=[Probe(ProbeKind.LOGITS, row) for row in range(len(tail))])
        for context, tail in zip([stranger, *forks, last], tails, strict=True)
    ]
    for each in requests:
        stepper.make_room(each.context, len(each.tokens))
    result = stepper.collect(stepper.submit_batch(requests, stepper.grouped(requests, groups)))
    assert not result.failed
    return np.stack([probe_values(result, row) for row in range(sum(map(len, tails)))])


@pytest.mark.parametrize("rows", [4, 24])
def test_rows_that_are_read_together_give_the_same_answers(
    folder: Path, read_together: list[int], rows: int
) -> None:
    stepper = Stepper(portable(folder, kv_page_size=4, shared_prefixes="always"))
    alone = answers(stepper, [])
    assert not read_together
    together = answers(stepper, [(1, 4, rows)])
    assert set(read_together) == {rows}
    assert np.abs(together - alone).max() < 1e-5 * np.abs(alone).max()
    assert np.array_equal(together[[0, -1]], alone[[0, -1]]), "whoever shares nothing reads as ever"


def test_in_float32_every_bit_counts_unless_it_is_asked_for(folder: Path, read_together: list[int]) -> None:
    stepper = Stepper(portable(folder, kv_page_size=4))
    assert np.array_equal(answers(stepper, []), answers(stepper, [(1, 4, 24)]))
    assert not read_together


def test_in_bfloat16_it_is_done_as_a_matter_of_course(folder: Path, read_together: list[int]) -> None:
    stepper = Stepper(portable(folder, kv_page_size=4, dtype="bfloat16"))
    alone, together = answers(stepper, []), answers(stepper, [(1, 4, 24)])
    assert set(read_together) == {24}
    assert np.abs(together - alone).max() < 0.03 * np.abs(alone).max()


def test_forks_that_decode_side_by_side_read_their_prompt_together(
    folder: Path, read_together: list[int]
) -> None:
    drawn = []
    for choice in ("always", "never"):
        driver = portable(folder, kv_page_size=4, shared_prefixes=choice, total_pages=128)
        engine = SteppedEngine(driver)
        engine.create(1)
        engine.forward(1, PROMPT)
        for child in (2, 3, 4):
            engine.fork(1, child)
        requests = [engine.begin_generation(each, [each], 8, RANDOM) for each in (1, 2, 3, 4)]
        engine.run()
        drawn.append([engine.generated(each) for each in requests])
        driver.close()
    assert drawn[0] == drawn[1]
    assert set(read_together) == {24}
