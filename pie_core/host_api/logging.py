"""Lines that guests write to the server's log."""

from __future__ import annotations

import logging

from pie_core.host_api.guest_state import ProgramState
from pie_core.sandbox.hosting import Interface
from pie_core.telemetry.log_lines import about

interface = Interface("logging")

TRACE = 5
LEVELS = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
LONGEST = 16_384

logging.addLevelName(TRACE, "TRACE")
guest_log = logging.getLogger("pie.guest")


@interface.function("log")
def log(guest: ProgramState, level: str, message: str) -> None:
    """Control characters are escaped, so that a guest cannot forge lines of others."""
    shown = message if len(message) <= LONGEST else f"{message[:LONGEST]}… ({len(message)} characters)"
    told = about(guest.process, guest.traceparent)
    guest_log.log(LEVELS[level], "%s: %s", guest.name, _on_one_line(shown), extra=told)


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
