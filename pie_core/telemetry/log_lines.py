"""Log lines of all of pie's processes: as text or as JSON, with the program and the trace that they are about."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Literal

from pie_core.telemetry import traceparent

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_ABOUT = ("process", "trace_id")


def about(process: str, parent: str | None) -> dict[str, str]:
    """`extra` of a log call: which program the line is about, and in which trace."""
    if parent is None:
        return {"pie_process": process}
    return {"pie_process": process, "pie_trace_id": traceparent.trace_id_of(parent)}


def start_log_lines(level: int | str, form: LogFormat, role: str = "server") -> None:
    """On stderr, from `level` on; a second call changes level and form."""
    root = logging.getLogger()
    formatter = JsonFormatter(role) if form == "json" else TextFormatter(_TEXT, datefmt="%H:%M:%S")
    if not root.handlers:  # where pie is a guest itself, whoever has set up logging keeps it
        root.addHandler(logging.StreamHandler())
        root.handlers[0].setFormatter(formatter)
    elif isinstance(root.handlers[0].formatter, _OURS):
        root.handlers[0].setFormatter(formatter)
    root.setLevel(level)


class TextFormatter(logging.Formatter):
    """One line as people read it; the trace stands at its end, the program in its words."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        trace_id = getattr(record, "pie_trace_id", None)
        return line if trace_id is None else f"{line} trace={trace_id}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, tracebacks included."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "role": self._role,
            "pid": os.getpid(),
            "message": record.getMessage(),
        }
        for name in _ABOUT:
            value = getattr(record, f"pie_{name}", None)
            if value is not None:
                line[name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


_OURS = (TextFormatter, JsonFormatter)
