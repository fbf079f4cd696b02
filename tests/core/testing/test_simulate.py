"""The simulation finds nothing wrong in the engine, and finds what is made wrong on purpose."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from pie_core.contracts.forward import Int32, Int64
from pie_core.kv_pages import prefix_cache
from pie_core.kv_pages.page_list import PageList
from pie_core.kv_pages.prefix_blocks import Block, shared_out
from pie_core.scheduler import run_ahead
from pie_core.scheduler.cohort import Cohort
from pie_core.scheduler.request import Pass
from pie_core.testing import simulation_jobs
from pie_core.testing.simulate import Report, simulate, simulate_in_jobs
from pie_core.testing.simulated_history import MAX_ROWS, Settings


def failures(report: Report) -> str:
    return "\n".join(f"seed {seed}: {cause}" for seed, cause in report.failures.items())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nothing_goes_wrong_in_ten_thousand_histories_in_which_everything_happens() -> None:
    """What never happened makes the command fail, too."""
    command = [sys.executable, "-m", "pie_core.testing.simulate", "--histories", "10000"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1:] == ["10000 passed, 0 failed"], ended.stdout + ended.stderr
    assert ended.returncode == 0, ended.stdout


def test_a_history_has_enough_programs_and_events() -> None:
    settings = [Settings.of(Random(seed)) for seed in range(2000)]
    assert min(each.programs for each in settings) >= 8
    assert {each.oversubscription for each in settings} == {1, 2, 4, 8, 16, 32, 64}
    for each in settings:
        wanted, rows = each.programs * MAX_ROWS, each.num_pages * each.page_size
        assert wanted / rows >= 0.8 * each.oversubscription
    assert all(simulate(1, seed).coverage["events"] >= 200 for seed in range(5))


def test_a_history_depends_on_its_seed_alone() -> None:
    first, second = simulate(3, seed=7), simulate(3, seed=7)
    assert first == second
    assert simulate(3, seed=8) != first


def test_a_leaked_page_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PageList._keep

    def forgetful(self: PageList, first: int, stop: int) -> None:
        if first == stop == 0 and self._size > 3:  # releasing a long context loses one page
            self._pages, self._logical, self._size = self._pages[1:], self._logical[1:], self._size - 1
        honest(self, first, stop)

    monkeypatch.setattr(PageList, "_keep", forgetful)
    report = simulate(20, seed=0)
    assert "something is left" in failures(report)


def test_a_wrongly_shared_page_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageList, "writes_shared", lambda self, written: False)
    report = simulate(20, seed=0)
    assert "alone it draws" in failures(report)


def test_rows_of_host_memory_on_the_wrong_page_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = shared_out

    def swapped(pages: Sequence[Int32], blocks: Sequence[Block]) -> Iterator[list[Int32]]:
        yield from reversed(list(honest(pages, blocks)))

    monkeypatch.setattr(prefix_cache, "shared_out", swapped)
    report = simulate(60, seed=0)
    assert "alone it draws" in failures(report)


def test_a_stale_staged_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess is claimed by a pass that feeds another token."""

    def is_same(guess: Pass, asked: Pass) -> bool:
        return asked.context.history.length == asked.base + 1 == guess.base + 1

    monkeypatch.setattr(run_ahead, "_is_same", is_same)
    report = simulate(60, seed=0)
    assert "alone it draws" in failures(report)


def test_a_stale_row_of_the_arrays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that was computed ahead is claimed by a step that feeds another token."""
    honest, honest_computed = Cohort.claim, Cohort.claim_computed

    def drawn(self: Cohort, places: Int64) -> Int64:
        columns = self.columns
        tokens: Int64 = columns.tokens[places, columns.claimed[places] & self._mask].astype(np.int64)
        return tokens

    def claim(
        self: Cohort, places: Int64, tokens: Int64, requests: Int64, *, are_steps: bool
    ) -> NDArray[np.bool_]:
        is_ahead = self.columns.submitted[places] > self.columns.claimed[places]
        tokens = np.where(is_ahead, drawn(self, places), tokens)
        return honest(self, places, tokens, requests, are_steps=are_steps)

    def claim_computed(self: Cohort, place: int, token: int) -> tuple[int, int] | None:
        return honest_computed(self, place, int(drawn(self, np.array([place]))[0]))

    monkeypatch.setattr(Cohort, "claim", claim)
    monkeypatch.setattr(Cohort, "claim_computed", claim_computed)
    report = simulate(60, seed=0)
    assert "alone it draws" in failures(report)


def test_a_prefix_that_is_not_the_same_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from pie_core.kv_pages.prefix_blocks import Rows
    from pie_core.kv_pages.prefix_cache import PrefixCache

    def forgets_what_stood_before(self: PrefixCache, before: bytes, rows: Rows) -> bytes:
        return rows.tokens.tobytes() + rows.positions.tobytes()

    monkeypatch.setattr(PrefixCache, "key", forgets_what_stood_before)
    report = simulate(40, seed=0)
    assert "alone it draws" in failures(report)


def test_the_command_ends_with_what_passed_and_failed() -> None:
    command = [sys.executable, "-m", "pie_core.testing.simulate", "--histories", "2", "--seed", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "2 passed, 0 failed"


def test_what_comes_out_does_not_depend_on_the_number_of_processes() -> None:
    alone, side_by_side = (simulate_in_jobs(45, 3, jobs, print) for jobs in (1, 2))
    assert alone == side_by_side == simulate(45, 3)


def test_a_process_that_dies_is_a_failure_of_the_history_that_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation_jobs, "_COMMAND", (sys.executable, "-c", DIES_AT_FIVE))
    outcomes = list(simulation_jobs.in_processes(range(4, 8), 1))
    assert [each.seed for each in outcomes] == [4, 5, 6, 7]
    assert [each.failure for each in outcomes] == [
        None,
        f"the process that ran it ended with status -{signal.SIGKILL}",
        None,
        None,
    ]


DIES_AT_FIVE = """
import os, sys
for line in sys.stdin:
    if int(line) == 5:
        os.kill(os.getpid(), 9)
    print('{"seed": %d, "failure": null, "counts": {}}' % int(line), flush=True)
"""


def test_a_history_that_never_ends_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation_jobs, "_COMMAND", (sys.executable, "-c", NEVER_ENDS))
    [outcome] = simulation_jobs.in_processes(range(1), 1)
    assert outcome.failure is not None
    assert outcome.failure.startswith("it has run for 0.1 s of processor time, now at ")


NEVER_ENDS = """
from pie_core.testing import simulation_jobs

def run(seed):
    try:
        while True:
            pass
    except TimeoutError as error:
        return simulation_jobs.Outcome(seed, str(error), {})

simulation_jobs.PATIENCE_S = 0.1
simulation_jobs.run_as_job(run)
"""
