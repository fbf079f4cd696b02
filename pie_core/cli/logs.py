"""Log lines on stderr, from the level that `--log-level` or `telemetry.log_level` names."""

from __future__ import annotations

from typing import Annotated

import typer

from pie_core.config.tree import LogLevel
from pie_core.telemetry.log_lines import LogFormat, start_log_lines

LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(help="The least important log lines to show on stderr; goes before `telemetry.log_level`."),
]


def start_logging(level: LogLevel, form: LogFormat = "text") -> None:
    """Shows log lines from `level` on; a second call changes level and form."""
    start_log_lines(level.upper(), form)
