"""Log lines on stderr, from the level that `--log-level` or `telemetry.log_level` names."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from pie_core.config.tree import LogLevel

LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(help="The least important log lines to show on stderr; goes before `telemetry.log_level`."),
]

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def start_logging(level: LogLevel) -> None:
    """Shows log lines from `level` on; a second call only changes the level."""
    logging.basicConfig(format=_FORMAT, datefmt="%H:%M:%S")
    logging.getLogger().setLevel(level.upper())
