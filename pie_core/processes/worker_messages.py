"""Every message between us and a worker process: what it serves, the programs it runs, what they and clients say."""

from __future__ import annotations

from typing import Literal

import msgspec

from pie_core.ids import ModelName, ProcessId, Tenant
from pie_core.processes.messages import Loading
from pie_core.sandbox.compilation import CompileLimits
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.runtime import Runtime
from pie_core.telemetry.log_lines import LogFormat
from pie_core.telemetry.tracing import TraceSettings

Channel = Literal["message", "file", "stdout", "stderr"]
InputChannel = Literal["message", "file"]


class Message(msgspec.Struct, frozen=True, tag=True):
    """One frame; encodes to MessagePack as it is."""


# ---- to the worker


class StartWorker(Message, frozen=True):
    """The first message."""

    worker: int  # never given twice by one pie
    cache_folder: str
    compile_limits: CompileLimits
    output_bytes: int
    log_level: int
    log_format: LogFormat = "text"
    traces: TraceSettings | None = None


class AddModel(Message, frozen=True):
    model: ModelName
    engines_at: tuple[str, ...]  # sockets, one for each replica
    checkpoint: str  # of its tokenizer and chat template


class RemoveModel(Message, frozen=True):
    model: ModelName


class Prepare(Message, frozen=True):
    """Loads the Python guest."""


class ReadCounts(Message, frozen=True):
    """Asks for Counts."""


class Launch(Message, frozen=True):
    process: ProcessId
    username: str
    tenant: Tenant
    name: str
    component: str | None  # its path; None: source text for the Python guest
    files: tuple[tuple[str, str], ...]
    entry: str
    inputs: str
    limits: Limits
    priority: int
    traceparent: str | None = None


class Stop(Message, frozen=True):
    process: ProcessId


class Input(Message, frozen=True):
    """An item that the program asked for; None: no more will come."""

    process: ProcessId
    channel: InputChannel
    item: bytes | None


class Taken(Message, frozen=True):
    """The client has taken this much of what the program said."""

    process: ProcessId
    size: int


class ProgramLaunched(Message, frozen=True):
    """Answers LaunchProgram; without a process, with why it was not launched."""

    parent: ProcessId
    number: int
    process: ProcessId | None
    code: str = ""
    message: str = ""


class LaunchedEnded(Message, frozen=True):
    """A program that one in this worker launched has ended: with a value, JSON, or with an error."""

    parent: ProcessId
    number: int
    value: str | None
    code: str = ""
    message: str = ""


ToWorker = (
    StartWorker
    | AddModel
    | RemoveModel
    | Prepare
    | ReadCounts
    | Launch
    | Stop
    | Input
    | Taken
    | ProgramLaunched
    | LaunchedEnded
)


# ---- from the worker


class ModelAdded(Message, frozen=True):
    model: ModelName


class Reached(Message, frozen=True):
    """An engine has taken the worker in."""

    engine_at: str
    pid: int


class Prepared(Message, frozen=True):
    """Answers Prepare; without a code, Python programs can run."""

    code: str | None = None
    message: str = ""


class Counts(Message, frozen=True):
    """What its guests have done since it began."""

    resumes: int
    host_calls: int
    live_guests: int

    @classmethod
    def of(cls, runtime: Runtime) -> Counts:
        return cls(runtime.resumes, runtime.host_calls, runtime.live_guests)


class Wanted(Message, frozen=True):
    """The program waits for an item."""

    process: ProcessId
    channel: InputChannel


class Said(Message, frozen=True):
    process: ProcessId
    channel: Channel
    content: bytes


class Returned(Message, frozen=True):
    process: ProcessId
    value: str | None  # JSON


class Raised(Message, frozen=True):
    process: ProcessId
    code: str
    message: str


class LaunchProgram(Message, frozen=True):
    """A program launches another one, which it numbers; answered by ProgramLaunched."""

    parent: ProcessId
    number: int
    program: str
    given: str  # JSON


class CancelLaunched(Message, frozen=True):
    """Gives a launch up, or ends what was launched."""

    parent: ProcessId
    number: int


class ForgetLaunched(Message, frozen=True):
    """Nobody will ask about it any more; it goes on."""

    parent: ProcessId
    number: int


FromWorker = (
    ModelAdded
    | Reached
    | Prepared
    | Counts
    | Wanted
    | Said
    | Returned
    | Raised
    | Loading
    | LaunchProgram
    | CancelLaunched
    | ForgetLaunched
)
