"""State in slots: pieces of requests of several lengths, kept states, and steps in which every request fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pie_core.testing.any_architecture import asking, rows_of, write_checkpoint
from pie_core.testing.batches import Request, Sample, Stepper
from pie_plugins.models import kimi_linear, nemotron_h, qwen3_5
from tests.plugins.models.reference import portable
from tests.plugins.models.test_kimi_linear import tiny_kimi
from tests.plugins.models.test_nemotron_h import tiny_nemotron
from tests.plugins.models.test_qwen3_5 import tiny_qwen

MODELS = {
    "kimi_linear": (kimi_linear.DECLARATION, tiny_kimi([1, 2], [3])),
    "nemotron_h": (nemotron_h.DECLARATION, tiny_nemotron("M*")),
    "qwen3_5": (qwen3_5.DENSE, tiny_qwen()),
}


@pytest.fixture(params=sorted(MODELS))
def stepper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stepper]:
    write_checkpoint(tmp_path, *MODELS[request.param])
    driver = portable(tmp_path)
    yield Stepper(driver)
    driver.close()


def test_a_step_in_which_every_request_fails_names_each(stepper: Stepper) -> None:
    wrong = [Request(stepper.context(), [999], samples=[Sample()]) for _ in range(2)]
    failed = stepper.run(wrong).failed
    assert sorted(failed) == [0, 1]
    assert all("token id 999" in cause for cause in failed.values())


def test_a_slot_that_does_not_exist_fails_its_request_alone(stepper: Stepper) -> None:
    prompt = [5, 6, 7]
    expected = rows_of(stepper, [asking(stepper.context(), prompt)])
    lost = stepper.context()
    stepper.run([Request(lost, prompt)])
    (group,) = (each for each in range(len(stepper.book.spaces)) if stepper.book.is_state(each))
    lost.slots[group] = 10**6
    requests = [asking(stepper.context(), prompt), asking(lost, [8])]
    stepper.make_room(requests[0].context, 3)
    stepper.make_room(lost, 1)
    ticket = stepper.driver.submit(stepper.build(requests))
    result = stepper.driver.collect(ticket)
    assert list(result.failed) == [1]
    assert "slot 1000000" in result.failed[1]
    first = result.probe_values[: expected.size].reshape(expected.shape)
    assert abs(first - expected).max() <= 1e-5 * expected.std()
