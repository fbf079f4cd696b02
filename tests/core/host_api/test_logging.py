"""Lines that guests write to the server's log: one line each, of nobody else, with their trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from pie_core.host_api.guest_state import ProgramState
from pie_core.host_api.logging import LEVELS, log
from pie_core.ids import ProcessId, Tenant

if TYPE_CHECKING:
    from pie_core.host_api.guest_state import ClientLink

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def guest(traceparent: str | None) -> ProgramState:
    nobody = cast("ClientLink", None)
    return ProgramState(ProcessId("guest-7"), "alice", Tenant("alice"), {}, nobody, traceparent=traceparent)


def test_log_lines_of_guests_cannot_forge_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1, "pie.guest")
    for level in LEVELS:
        log(guest(None), level, "first\nguest-8: second")
    log(guest(None), "info", "x" * 100_000)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:5] == ["guest-7: first\\nguest-8: second"] * 5
    assert [record.levelno for record in caplog.records[:5]] == [5, 10, 20, 30, 40]
    assert len(lines[5]) < 20_000


def test_log_lines_of_guests_carry_their_program_and_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1, "pie.guest")
    for traceparent in (None, TRACE):
        log(guest(traceparent), "info", "here")
    without, with_trace = map(vars, caplog.records)
    assert without["pie_process"] == with_trace["pie_process"] == "guest-7"
    assert "pie_trace_id" not in without
    assert with_trace["pie_trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"
