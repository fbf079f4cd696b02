"""Every message between us and an engine process: how it loads its model, then the port's messages in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pie_core.engine.messages import Command, Event, ModelInfo
from pie_core.engine.options import EngineOptions
from pie_core.telemetry.log_lines import LogFormat
from pie_core.telemetry.tracing import TraceSettings


class Message(msgspec.Struct, frozen=True, tag=True):
    """One frame; encodes to MessagePack as it is."""


# ---- to the engine process


class LoadModel(Message, frozen=True):
    """The first message, and sent once."""

    model: str
    driver: str
    path: str | None
    device: str
    driver_options: dict[str, Any]
    engine_options: EngineOptions
    log_level: int
    listen_at: str | None = None  # a Unix socket for workers
    log_format: LogFormat = "text"
    traces: TraceSettings | None = None


class Commands(Message, frozen=True):
    """All that was sent in one turn of our event loop."""

    commands: Sequence[Command]


class Join(Message, frozen=True):
    """The first message of a worker; `Loaded` answers it."""

    worker: int


ToEngine = LoadModel | Commands | Join


# ---- from the engine process


class Loading(Message, frozen=True):
    """How far it is; see `contracts.driver.Progress`."""

    label: str
    done: int
    total: int
    unit: str


class NotLoaded(Message, frozen=True):
    """Loading failed with the error that `errors.error_from_code` finds; the process ends."""

    code: str
    message: str


class Loaded(Message, frozen=True):
    """Commands are taken from now on."""

    info: ModelInfo
    pid: int
    turn_deadline_s: float  # an event loop that does not turn for so long hangs


class Events(Message, frozen=True):
    """All events of a step, or of what was answered at once."""

    events: Sequence[Event]


class Broken(Message, frozen=True):
    """The engine is lost, though its process can still say so; every open request has been answered."""


FromEngine = Loading | NotLoaded | Loaded | Events | Broken
