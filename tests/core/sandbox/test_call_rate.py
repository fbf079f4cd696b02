"""Calls of the host: counted in portions, and refused where a second has brought too few."""

from __future__ import annotations

import pytest

from pie_core.errors import LimitExceeded
from pie_core.sandbox import call_rate
from pie_core.sandbox.call_rate import PORTION, Bucket, CallRate


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(call_rate, "time", clock)
    return clock


class Caller:
    """Counts as the linker's callbacks do."""

    def __init__(self, rate: CallRate) -> None:
        self.rate = rate
        self.left = 0
        self.looks = 0

    def call(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.looks += 1
            owed, self.left = -self.left, self.left + 1
            self.left = self.rate.more(owed)

    def calls_until_refused(self) -> int:
        calls = 0
        while calls < 1_000_000:
            try:
                self.call()
            except LimitExceeded:
                return calls
            calls += 1
        return calls


def test_without_limits_calls_are_counted_in_portions() -> None:
    caller = Caller(CallRate())
    for _ in range(10 * PORTION):
        caller.call()
    assert caller.looks <= 10
    assert caller.rate.granted - caller.left == 10 * PORTION


@pytest.mark.parametrize("per_second", [1.0, 7.5, 100.0, 50_000.0])
def test_a_burst_is_what_one_second_brings_and_a_rest_brings_more(clock: Clock, per_second: float) -> None:
    caller = Caller(CallRate(Bucket(per_second)))
    assert caller.calls_until_refused() == int(per_second)
    assert caller.calls_until_refused() == 0
    clock.now += 1.0
    assert caller.calls_until_refused() == pytest.approx(per_second, abs=1)
    clock.now += 3600.0
    assert caller.calls_until_refused() == pytest.approx(per_second, abs=1)


def test_refused_calls_do_not_count(clock: Clock) -> None:
    caller = Caller(CallRate(Bucket(10.0)))
    caller.calls_until_refused()
    for _ in range(1000):
        assert caller.calls_until_refused() == 0
    clock.now += 0.5
    assert caller.calls_until_refused() == 5


def test_calls_that_cannot_be_refused_count_up_to_a_portion(clock: Clock) -> None:
    rate = CallRate(Bucket(160.0))
    assert rate.more(owed=1000) == 10  # the portion of this rate, behind the ten that were made
    assert rate.granted == 20


def test_a_tenant_s_programs_share_what_it_has(clock: Clock) -> None:
    tenant = Bucket(100.0)
    first, second = (Caller(CallRate(Bucket(80.0), tenant)) for _ in range(2))
    assert first.calls_until_refused() == 80
    assert second.calls_until_refused() == 20
    with pytest.raises(
        LimitExceeded, match=r"call 21 .*runtime\.calls_per_s_per_tenant allows 100 in a second"
    ):
        second.call()
    with pytest.raises(LimitExceeded, match=r"runtime\.calls_per_s_per_program allows 80 in a second"):
        first.call()
