"""Every message on the wire between a client and a server, as types: MessagePack maps with a `type` and named fields.

A request carries a `corr_id` of the client's choice and gets exactly one `response` with it. Requests that may go
without one (`corr_id` 0) are answered only if they fail. Names and fields of Pie 0.4 are kept; all that is added is
optional.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from pie_core.errors import ProtocolError
from pie_core.telemetry import traceparent

PROTOCOL = 1  # grows when a message changes its meaning; what is only added does not count
CHUNK_BYTES = 256 * 1024

CorrId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Index = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**32 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Chunk = Annotated[bytes, Meta(max_length=CHUNK_BYTES)]
Inputs = Annotated[list[str], Meta(min_length=1, max_length=4096)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Budget = Annotated[int, Meta(ge=1)]
Traceparent = Annotated[str, Meta(pattern=traceparent.PATTERN)]  # of W3C Trace Context


def _wire_name(name: str) -> str:
    """AuthIdentify -> auth_identify."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


class Request(msgspec.Struct, tag=_wire_name, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """From a client to the server."""

    scope: ClassVar[str | None] = "run"  # what the credentials must cover; None: no credentials are needed
    corr_id: CorrId


class Hello(Request, frozen=True, kw_only=True):
    """Says which protocol the client speaks; clients of Pie 0.4 do not, and are taken to speak 1."""

    scope = None
    protocol: int
    client: Annotated[str, Meta(max_length=256)] = ""


class AuthIdentify(Request, frozen=True, kw_only=True):
    """Asks for a challenge to sign; without authentication it just says who the client is."""

    scope = None
    username: Name


class AuthProve(Request, frozen=True, kw_only=True):
    """The challenge, signed with the user's private key, in base64."""

    scope = None
    signature: Annotated[str, Meta(max_length=8192)]


class AuthByToken(Request, frozen=True, kw_only=True):
    """An API key."""

    scope = None
    token: Annotated[str, Meta(max_length=1024)]


class Ping(Request, frozen=True, kw_only=True):
    """Asks for a sign of life."""


class Query(Request, frozen=True, kw_only=True):
    """Asks about a `subject`: model_status, or process_status with a process id as `record`."""

    subject: Name
    record: Annotated[str, Meta(max_length=1024)]


class ReadStatus(Request, frozen=True, kw_only=True):
    """How the server does; answered with a JSON object, `ServerStatus` below.

    `processes` are the user's own; a key with the scope `observe` sees everybody's.
    """

    scope = "metrics"


class CheckProgram(Request, frozen=True, kw_only=True):
    """Whether the server has a program: by name and version, and by content where hashes are given."""

    name: Name
    version: Annotated[str, Meta(max_length=64)]
    wasm_hash: Digest | None = None
    manifest_hash: Digest | None = None


class AddProgram(Request, frozen=True, kw_only=True):
    """One chunk of an upload, in order; the last one is answered once the program is installed."""

    scope = "programs"
    program_hash: Digest
    manifest: Annotated[str, Meta(max_length=1 << 20)]
    force_overwrite: bool
    chunk_index: Index
    total_chunks: Count
    chunk_data: Chunk


class ResumeUpload(Request, frozen=True, kw_only=True):
    """Which chunk of an interrupted upload comes next."""

    scope = "programs"
    program_hash: Digest


class ListPrograms(Request, frozen=True, kw_only=True):
    """The programs that can be launched."""


class RemoveProgram(Request, frozen=True, kw_only=True):
    """Uninstalls one version of a program."""

    scope = "programs"
    name: Name
    version: Annotated[str, Meta(max_length=64)]


class LaunchProcess(Request, frozen=True, kw_only=True):
    """Starts `inferlet` (name or name@version) with `input`, JSON text; answered with the process id.

    With `capture_outputs` the client is attached; without, nobody is, and what is printed is not kept. Of programs with
    a higher `priority`, passes go first; more than `server.max_priority` is refused. `traceparent`, of W3C Trace
    Context, makes it part of a trace of the client's.
    """

    inferlet: Name
    input: str
    capture_outputs: bool
    token_budget: Budget | None = None
    priority: Priority = 0
    traceparent: Traceparent | None = None


class LaunchProcesses(Request, frozen=True, kw_only=True):
    """Starts one process for each input; answered with a JSON list of process ids."""

    inferlet: Name
    inputs: Inputs
    capture_outputs: bool
    token_budgets: list[Budget | None] | None = None
    priority: Priority = 0
    traceparent: Traceparent | None = None


class RunProcesses(Request, frozen=True, kw_only=True):
    """Starts one process for each input and waits; answered with a JSON list of return values."""

    inferlet: Name
    inputs: Inputs
    token_budgets: list[Budget | None] | None = None
    priority: Priority = 0
    traceparent: Traceparent | None = None


class LaunchDaemon(Request, frozen=True, kw_only=True):
    """A program that serves HTTP on a port of its own; refused by this version."""

    port: Annotated[int, Meta(ge=0, le=65535)]
    inferlet: Name
    input: str


class AttachProcess(Request, frozen=True, kw_only=True):
    """Events of the process come here from now on: those not sent yet or, with `after`, those behind that `seq`."""

    process_id: Name
    after: Annotated[int, Meta(ge=0)] | None = None


class DetachProcess(Request, frozen=True, kw_only=True):
    """No more events of the process, which goes on."""

    process_id: Name


class TerminateProcess(Request, frozen=True, kw_only=True):
    """Ends the process; its last event is an error with the code `cancelled`."""

    process_id: Name


class SignalProcess(Request, frozen=True, kw_only=True):
    """A message for the process, which gets it from `session.receive`."""

    corr_id: CorrId = 0
    process_id: Name
    message: str


class TransferFile(Request, frozen=True, kw_only=True):
    """One chunk of a file for the process, in order; the whole is checked against its BLAKE3 hash."""

    corr_id: CorrId = 0
    process_id: Name
    file_hash: Digest
    chunk_index: Index
    total_chunks: Count
    chunk_data: Chunk


class CloseInput(Request, frozen=True, kw_only=True):
    """No more messages and files will come for the process."""

    process_id: Name


class ListProcesses(Request, frozen=True, kw_only=True):
    """The user's own processes; those that ended a while ago only with `include_ended`."""

    include_ended: bool = False


class ListModels(Request, frozen=True, kw_only=True):
    """The configured models and whether they are loaded."""


class LoadModel(Request, frozen=True, kw_only=True):
    """Loads a model of the server's configuration."""

    scope = "models"
    name: Name


class UnloadModel(Request, frozen=True, kw_only=True):
    """Frees a model; programs that use it get `engine-lost`."""

    scope = "models"
    name: Name


class RegisterMcpServer(Request, frozen=True, kw_only=True):
    """Offers an MCP server that the client runs; requests to it come as `mcp_request`."""

    name: Name
    transport: Annotated[str, Meta(max_length=64)]
    command: Annotated[str, Meta(max_length=4096)] | None = None
    args: list[str] | None = None
    url: Annotated[str, Meta(max_length=4096)] | None = None


class ListMcpServers(Request, frozen=True, kw_only=True):
    """The MCP servers that this connection offers."""


class McpResponse(Request, frozen=True, kw_only=True):
    """The answer to an `mcp_request` (whose corr_id it carries); it gets no response itself."""

    ok: bool
    result: str


class SubmitWorkflow(Request, frozen=True, kw_only=True):
    """A tree of processes; refused by this version."""

    json: str


class CancelWorkflow(Request, frozen=True, kw_only=True):
    """Refused by this version, as all workflows."""

    workflow_id: str


class AttachWorkflow(Request, frozen=True, kw_only=True):
    """Refused by this version, as all workflows."""

    workflow_id: str


class DetachWorkflow(Request, frozen=True, kw_only=True):
    """Refused by this version, as all workflows."""

    workflow_id: str


class Reply(msgspec.Struct, tag=_wire_name, frozen=True, kw_only=True, omit_defaults=True):
    """From the server to a client."""


class Response(Reply, frozen=True, kw_only=True):
    """Answers the request with this corr_id. Of an error, `result` says what is wrong and `error_code` its kind."""

    corr_id: CorrId
    ok: bool
    result: str
    error_code: str | None = None


class ProcessEvent(Reply, frozen=True, kw_only=True):
    """`event` is stdout, stderr, message, return or error; the last two are a process's last.

    `seq` counts the events of a process from 1. `dropped` events before this one were lost while nobody was attached.
    A return value that is not text comes as JSON text and says so.
    """

    process_id: str
    event: str
    value: str
    seq: int = 0
    dropped: int = 0
    is_json: bool = False
    error_code: str | None = None


class File(Reply, frozen=True, kw_only=True):
    """One chunk of a file that a process sent, in order; BLAKE3 over the whole."""

    process_id: str
    file_hash: str
    chunk_index: int
    total_chunks: int
    chunk_data: bytes
    seq: int = 0
    dropped: int = 0


class Detached(Reply, frozen=True, kw_only=True):
    """Another connection has attached to the process: no more of its events come here."""

    process_id: str


class McpRequest(Reply, frozen=True, kw_only=True):
    """A program calls an MCP server that this client offers; answered by an `mcp_response`."""

    corr_id: CorrId
    process_id: str
    server_name: str
    method: str
    params: str


REQUESTS: tuple[type[Request], ...] = tuple(Request.__subclasses__())
REPLIES: tuple[type[Reply], ...] = tuple(Reply.__subclasses__())


class _Heading(msgspec.Struct):
    """What can be told of a message that is wrong otherwise."""

    type: str = ""
    corr_id: Any = 0


_NAMES = {kind.__struct_config__.tag: kind for kind in REQUESTS}
_DECODERS = {name: msgspec.msgpack.Decoder(kind) for name, kind in _NAMES.items()}
_headings = msgspec.msgpack.Decoder(_Heading)
_any_reply: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Response | ProcessEvent | File | Detached | McpRequest
)
_encoder = msgspec.msgpack.Encoder()


class BadMessage(Exception):
    """A message that cannot be read; carries its corr_id if that much is known, and the error to tell."""

    def __init__(self, problem: str, corr_id: int = 0) -> None:
        super().__init__(problem)
        self.corr_id = corr_id
        self.error = ProtocolError(problem)


def encode(message: Request | Reply) -> bytes:
    return _encoder.encode(message)


def decode_request(data: bytes) -> Request:
    """Raises BadMessage that says what is wrong with it."""
    try:
        heading = _headings.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadMessage(f"a message is a MessagePack map with a `type`; this one is not: {error}") from None
    corr_id = heading.corr_id if _is_corr_id(heading.corr_id) else 0
    decoder = _DECODERS.get(heading.type)
    if decoder is None:
        raise BadMessage(
            f"unknown message type {heading.type[:64]!r}; known are {', '.join(sorted(map(str, _NAMES)))}",
            corr_id,
        )
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadMessage(f"{heading.type}: {error}", corr_id) from None


def decode_reply(data: bytes) -> Reply:
    """The client's side. Raises BadMessage."""
    try:
        reply: Reply = _any_reply.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadMessage(f"the server sent a message that this client cannot read: {error}") from None
    return reply


def wire_name(kind: type[Request] | type[Reply]) -> str:
    """The `type` of a message as it stands on the wire."""
    return str(kind.__struct_config__.tag)


def chunks_of(data: bytes) -> list[bytes]:
    """What is sent one message each; an empty file is one empty chunk."""
    return [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)] or [b""]


def _is_corr_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
