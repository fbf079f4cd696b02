"""What the portable driver does beyond the contract: single requests fail alone, order is kept, nothing leaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pie_core.contracts.driver import DriverRequest, Feature
from pie_core.contracts.forward import ForwardBatch, PageTable, ProbeKind
from pie_core.errors import ForwardError, InvalidRequest, LoadError, PieError
from pie_core.ids import Ticket
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import FromTicket, Mask, Probe, Request, Sample, Stepper, probe_values
from pie_plugins.drivers.portable.attention import AttentionPlan
from pie_plugins.drivers.portable.driver import load_portable
from pie_plugins.drivers.portable.options import PortableOptions
from pie_plugins.models.llama import DECLARATION
from tests.plugins.models.reference import ARCHITECTURES, portable, tiny

PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, DECLARATION, tiny("llama"))
    return path


@pytest.fixture
def stepper(folder: Path) -> Iterator[Stepper]:
    driver = portable(folder, kv_page_size=4, host_pages=8)
    yield Stepper(driver)
    driver.close()


def asking(stepper: Stepper, tokens: list[int]) -> Request:
    return Request(stepper.context(), tokens, samples=[Sample()], probes=[Probe(ProbeKind.LOGITS)])


def with_table(batch: ForwardBatch, table: PageTable) -> ForwardBatch:
    return replace(batch, cache=(table,))


def paged(batch: ForwardBatch) -> PageTable:
    (table,) = batch.cache
    assert isinstance(table, PageTable)
    return table


def run_changed(stepper: Stepper, requests: list[Request], place: int, page: int) -> dict[int, str]:
    """Runs the requests with one entry of the page table changed; the first must stay as it was."""
    expected = probe_values(stepper.run([asking(stepper, PROMPT)]), 0)
    for request in requests:
        stepper.make_room(request.context, len(request.tokens))
    batch = stepper.build(requests)
    pages = paged(batch).pages.copy()
    pages[place] = page
    changed = with_table(batch, replace(paged(batch), pages=pages))
    result = stepper.collect(stepper.submit_batch(requests, changed))
    assert np.abs(probe_values(result, 0) - expected).max() < 1e-5 * expected.std()
    return result.failed


@pytest.mark.parametrize("page", [-1, 10**6])
def test_a_page_that_does_not_exist_fails_its_request_only(stepper: Stepper, page: int) -> None:
    requests = [asking(stepper, PROMPT), asking(stepper, PROMPT)]
    failed = run_changed(stepper, requests, 7, page)
    assert list(failed) == [1]
    assert f"page {page} does not exist" in failed[1]


def test_a_row_without_a_page_fails_its_request_only(stepper: Stepper) -> None:
    requests = [asking(stepper, PROMPT), asking(stepper, PROMPT)]
    for request in requests:
        stepper.make_room(request.context, len(request.tokens))
    batch = stepper.build(requests)
    table = paged(batch)
    short = PageTable(np.array([0, 5, 9], np.int32), table.pages[:9], table.logical[:9])
    result = stepper.collect(stepper.submit_batch(requests, with_table(batch, short)))
    assert list(result.failed) == [1]
    assert "no page" in result.failed[1]


@pytest.mark.parametrize("position", [-1, 256])
def test_a_position_past_the_limit_fails_its_request_only(stepper: Stepper, position: int) -> None:
    wrong = Request(stepper.context(), [1], positions=[position], samples=[Sample()])
    result = stepper.run([asking(stepper, PROMPT), wrong])
    assert result.failed == {1: f"position {position} is outside 0 … 255"}


def test_logits_that_are_not_numbers_fail_their_request_only(stepper: Stepper) -> None:
    expected = probe_values(stepper.run([asking(stepper, PROMPT)]), 0)
    poisoned = stepper.context()
    stepper.run([Request(poisoned, PROMPT[:8])])
    page = poisoned.pages[0][0]
    content = stepper.driver.export_pages(0, [page])
    broken = np.full(content.size // 4, np.nan, np.float32).view(np.uint8).reshape(content.shape)
    stepper.driver.import_pages(0, [page], broken)
    result = stepper.run([asking(stepper, PROMPT), Request(poisoned, [5], samples=[Sample()])])
    assert list(result.failed) == [1]
    assert "not numbers" in result.failed[1]
    assert np.abs(probe_values(result, 0) - expected).max() < 1e-5 * expected.std()


def test_who_refers_to_a_failed_request_fails_with_its_cause(stepper: Stepper) -> None:
    wrong = Request(stepper.context(), [1], positions=[-1], samples=[Sample()])
    ticket = stepper.submit([wrong])
    following = stepper.submit(
        [Request(stepper.context(), [FromTicket(ticket, 0)], samples=[Sample()]), asking(stepper, PROMPT)]
    )
    stepper.collect(ticket)
    failed = stepper.collect(following).failed
    assert list(failed) == [0]
    assert f"ticket {ticket}" in failed[0]


def test_an_unknown_ticket_fails_its_request_only(stepper: Stepper) -> None:
    unknown = Request(stepper.context(), [FromTicket(Ticket(999), 0)], samples=[Sample()])
    assert list(stepper.run([unknown, asking(stepper, PROMPT)]).failed) == [0]


def test_a_step_without_memory_is_a_forward_error_and_the_next_one_runs(
    stepper: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stepper.run([asking(stepper, PROMPT)]).tokens

    def starved(*_: object) -> torch.Tensor:
        return torch.empty(2**60)

    with monkeypatch.context() as patch:
        patch.setattr(AttentionPlan, "run", starved)
        with pytest.raises(ForwardError, match="memory"):
            stepper.run([asking(stepper, PROMPT)])
    assert np.array_equal(stepper.run([asking(stepper, PROMPT)]).tokens, expected)


def test_read_only_batches_are_taken(stepper: Stepper) -> None:
    """As they come out of a message between processes."""
    sample = Sample(
        temperature=0.7,
        top_k=5,
        bias=[(3, 1.0)],
        allowed=range(0, 300),
        repetition=1.2,
        history=PROMPT,
    )
    probes = [Probe(kind, tokens=[1, 2] if kind == ProbeKind.LOGPROBS else []) for kind in ProbeKind]
    request = Request(stepper.context(), PROMPT, samples=[sample], probes=probes, masks=[Mask(3, [(0, 2)])])
    stepper.make_room(request.context, len(PROMPT))
    batch = stepper.build([request])
    expected = stepper.driver.collect(stepper.driver.submit(batch)).tokens
    for array in arrays_of(batch):
        array.flags.writeable = False
    result = stepper.driver.collect(stepper.driver.submit(batch))
    assert not result.failed
    assert np.array_equal(result.tokens, expected)


def arrays_of(part: object) -> list[NDArray[np.generic]]:
    if isinstance(part, np.ndarray):
        return [part]
    if isinstance(part, tuple):
        return [array for each in part for array in arrays_of(each)]
    return [array for each in fields(part) for array in arrays_of(getattr(part, each.name))]  # type: ignore[arg-type]


def test_a_ticket_is_collected_once(stepper: Stepper) -> None:
    request = asking(stepper, PROMPT)
    stepper.make_room(request.context, len(PROMPT))
    batch = stepper.build([request])
    ticket = stepper.driver.submit(batch)
    stepper.driver.collect(ticket)
    with pytest.raises(ForwardError, match="collected already"):
        stepper.driver.collect(ticket)


def test_page_operations_name_pages_that_do_not_exist(stepper: Stepper) -> None:
    driver = stepper.driver
    with pytest.raises(InvalidRequest, match="page 99999 "):
        driver.copy_pages(0, [0], [99999])
    with pytest.raises(InvalidRequest, match="host page 8 "):
        driver.swap_out(0, [0], [8])
    with pytest.raises(InvalidRequest, match="another model"):
        driver.import_pages(0, [0], np.zeros((1, 3), np.uint8))


def test_after_close_everything_is_refused_by_type(folder: Path) -> None:
    driver = portable(folder, host_pages=2)
    driver.close()
    for call in (lambda: driver.copy_pages(0, [0], [1]), lambda: driver.export_pages(0, [0])):
        with pytest.raises(PieError, match="closed"):
            call()


def test_a_driver_without_a_checkpoint_asks_for_one() -> None:
    with pytest.raises(LoadError, match="driver portable: no model is configured; name a Hugging Face"):
        load_portable(DriverRequest(None, "cpu", PortableOptions(), ARCHITECTURES, {}))


@pytest.mark.parametrize(
    ("swap_pages", "host_pages", "expected"), [(0, 0, 0), (5, 0, 5), (999, 0, 64), (5, 7, 7)]
)
def test_swap_space_is_what_the_model_may_swap_or_the_option_says(
    folder: Path, swap_pages: int, host_pages: int, expected: int
) -> None:
    """At most eight host pages for a page; beyond, they would hardly be used."""
    options = PortableOptions(dtype="float32", kv_page_size=4, total_pages=8, host_pages=host_pages)
    plain = portable(folder, kv_page_size=4)
    (space,) = plain.capabilities.cache
    plain.close()
    page_bytes = space.group.unit_bytes * space.page_size
    request = DriverRequest(folder, "cpu", options, ARCHITECTURES, {}, swap_bytes=swap_pages * page_bytes)
    driver = load_portable(request)
    (space,) = driver.capabilities.cache
    assert space.num_host_pages == expected
    assert driver.capabilities.has(Feature.SWAP) == (expected > 0)
    driver.close()
