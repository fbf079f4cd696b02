"""Log lines as text and as JSON, of whatever process, with the program and the trace that they are about."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest

from pie_core.telemetry.log_lines import JsonFormatter, TextFormatter, about

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def record(extra: dict[str, str], error: Exception | None = None) -> logging.LogRecord:
    details = None if error is None else (type(error), error, None)
    made = logging.LogRecord("pie_core.x", logging.INFO, "x.py", 1, "process %s started", ("p7",), details)
    vars(made).update(extra)
    return made


def test_a_line_for_people_ends_with_its_trace() -> None:
    lines = TextFormatter("%(levelname)s %(message)s")
    assert lines.format(record({})) == "INFO process p7 started"
    assert lines.format(record(about("p7", None))) == "INFO process p7 started"
    told = lines.format(record(about("p7", TRACE)))
    assert told == "INFO process p7 started trace=4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_line_of_json_has_all_that_a_collector_looks_for() -> None:
    line = json.loads(JsonFormatter("worker").format(record(about("p7", TRACE), ValueError("é"))))
    assert line.pop("time").startswith(("19", "20"))
    assert line == {
        "level": "info",
        "logger": "pie_core.x",
        "role": "worker",
        "pid": os.getpid(),
        "message": "process p7 started",
        "process": "p7",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "error": "ValueError: é",
    }


@pytest.mark.parametrize(("form", "first"), [("text", ""), ("json", "{")])
def test_a_second_start_changes_level_and_form(form: str, first: str) -> None:
    code = (
        "import logging; from pie_core.telemetry.log_lines import start_log_lines as start\n"
        f"start('WARNING', 'text'); logging.info('hidden'); start('INFO', {form!r}); logging.info('shown')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = run.stderr.splitlines()
    assert "shown" in line
    assert line.startswith(first)


def test_logging_that_somebody_else_has_set_up_stays() -> None:
    code = (
        "import logging, sys; from pie_core.telemetry.log_lines import start_log_lines\n"
        "logging.basicConfig(format='theirs %(message)s'); start_log_lines('INFO', 'json'); logging.info('x')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == "theirs x\n"
