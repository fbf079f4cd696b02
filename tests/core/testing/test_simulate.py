"""The simulation finds nothing wrong in the engine, and finds what is made wrong on purpose."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pie_core.contracts.forward import Int32
from pie_core.kv_pages.page_list import PageList
from pie_core.scheduler import run_ahead
from pie_core.scheduler.request import Pass
from pie_core.testing.simulate import COVERAGE, Report, simulate


def failures(report: Report) -> str:
    return "\n".join(f"seed {seed}: {cause}" for seed, cause in report.failures.items())


@pytest.mark.slow
def test_nothing_goes_wrong_in_many_histories_in_which_everything_happens() -> None:
    report = simulate(histories=500, seed=0)
    assert not report.failures, failures(report)
    assert {name for name in COVERAGE if not report.coverage[name]} == set()


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
    monkeypatch.setattr(PageList, "_writes_shared", lambda self, written: False)
    report = simulate(20, seed=0)
    assert "alone it draws" in failures(report)


def test_a_stale_staged_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess is claimed by a pass that feeds another token."""

    def is_same(guess: Pass, asked: Pass) -> bool:
        return asked.context.history.length == asked.base + 1 == guess.base + 1

    monkeypatch.setattr(run_ahead, "_is_same", is_same)
    report = simulate(60, seed=0)
    assert "alone it draws" in failures(report)


def test_a_prefix_that_is_not_the_same_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from pie_core.kv_pages.prefix_cache import PrefixCache

    def forgets_what_stood_before(
        self: PrefixCache, before: bytes, tokens: Int32, positions: Int32, masks: Any
    ) -> bytes:
        return tokens.tobytes()

    monkeypatch.setattr(PrefixCache, "key", forgets_what_stood_before)
    report = simulate(40, seed=0)
    assert "alone it draws" in failures(report)


def test_the_command_ends_with_what_passed_and_failed() -> None:
    command = [sys.executable, "-m", "pie_core.testing.simulate", "--histories", "2", "--seed", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "2 passed, 0 failed"
