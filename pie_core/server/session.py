"""What one connected client may ask, and the answers: each request in, one result or one typed error out."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from pie_core import __version__
from pie_core.errors import AccessDenied, InvalidRequest, PieError, Unavailable, Unsupported
from pie_core.programs import ProgramSource
from pie_core.server import messages as m
from pie_core.server.authentication import Gate, Login
from pie_core.server.credentials import Principal
from pie_core.server.inspection import Inspector
from pie_core.server.mcp import McpServers
from pie_core.server.models import Models, model_status
from pie_core.server.processes import Listener, ProcessTable, ServerProcess
from pie_core.server.programs import Programs
from pie_core.server.uploads import Chunk, Uploads

if TYPE_CHECKING:
    from pie_core.config import Config
    from pie_core.server.metrics import Metrics

log = logging.getLogger(__name__)

R = TypeVar("R", bound=m.Request)
Result = str | None  # None: no answer, now or at all
Handler = Callable[["Session", Any], Result | Awaitable[Result]]

_HANDLERS: dict[type[m.Request], Handler] = {}
_SLOW: set[type[m.Request]] = set()
_IDLE_UPLOADERS = 256


@dataclass(slots=True)
class Service:
    """What all sessions of a server share."""

    config: Config
    gate: Gate
    programs: Programs
    processes: ProcessTable
    models: Models
    metrics: Metrics
    inspector: Inspector
    uploads: dict[str, Uploads] = field(default_factory=dict)

    def uploads_of(self, principal: Principal) -> Uploads:
        if len(self.uploads) > _IDLE_UPLOADERS:
            self.uploads = {user: uploads for user, uploads in self.uploads.items() if uploads.is_open}
        if principal.user not in self.uploads:
            self.uploads[principal.user] = Uploads(
                self.config.runtime.max_program_bytes, "runtime.max_program_bytes"
            )
        return self.uploads[principal.user]


class Client(Listener, Protocol):
    """The connection, as far as a session needs it."""

    @property
    def peer(self) -> str: ...

    def send(self, reply: m.Reply) -> None: ...


class Session:
    """The state of one connection above its bytes."""

    def __init__(self, service: Service, client: Client) -> None:
        self.service = service
        self.client = client
        self.login = Login(service.gate, client.peer)
        self.mcp = McpServers(client.send)
        self.attached: dict[str, ServerProcess] = {}
        self._files: dict[str, Uploads] = {}
        self._broken_uploads: set[tuple[int, str]] = set()

    @property
    def is_busy(self) -> bool:
        """Somebody waits for something here."""
        return any(process.is_running for process in self.attached.values())

    def is_slow(self, request: m.Request) -> bool:
        """Answering takes so long that other requests of the connection go before."""
        is_last_chunk = isinstance(request, m.AddProgram) and request.chunk_index == request.total_chunks - 1
        return type(request) in _SLOW or is_last_chunk

    async def answer(self, request: m.Request) -> Result:
        """Raises PieError."""
        self.authorize(request)
        result = _HANDLERS[type(request)](self, request)
        return result if isinstance(result, str | None) else await result

    def authorize(self, request: m.Request) -> None:
        """Raises Unauthenticated or AccessDenied."""
        if request.scope is None:
            return
        principal = self.login.require()
        if request.scope not in principal.scopes:
            raise AccessDenied(
                f"{m.wire_name(type(request))} needs a key with the scope {request.scope!r}; this one has"
                f" {', '.join(sorted(principal.scopes)) or 'none'} (pie auth add --scope)"
            )

    @property
    def principal(self) -> Principal:
        return self.login.require()

    def find(self, process_id: str) -> ServerProcess:
        return self.service.processes.find(self.principal, process_id)

    def attach(self, process: ServerProcess, after: int | None = None) -> None:
        self.attached[process.id] = process
        process.attach(self.client, after)

    def detach(self, process: ServerProcess) -> None:
        if self.attached.pop(process.id, None) is not None:
            process.detach(self.client)

    def close(self) -> None:
        """The client is gone: its processes go on."""
        for process in list(self.attached.values()):
            self.detach(process)
        for files in self._files.values():
            files.close()
        self.mcp.close()

    # ---- uploads and files: a failure is told once, and the chunks that are still on their way are let pass

    def receive(self, uploads: Uploads, corr_id: int, chunk: Chunk) -> bytes | None:
        key = (corr_id, chunk.file_hash)
        if chunk.index == 0:
            self._broken_uploads.discard(key)
        elif key in self._broken_uploads:
            return None
        try:
            return uploads.add(chunk)
        except PieError:
            self.break_upload(key)
            raise

    def break_upload(self, key: tuple[int, str]) -> None:
        if len(self._broken_uploads) >= 1024:
            self._broken_uploads.clear()
        self._broken_uploads.add(key)

    def files_for(self, process: ServerProcess) -> Uploads:
        for ended in [
            each for each, _ in self._files.items() if each not in self.attached and each != process.id
        ]:
            self._files.pop(ended).close()
        limit = self.service.config.server.max_file_bytes
        return self._files.setdefault(process.id, Uploads(limit, "server.max_file_bytes"))


def _answers(
    kind: type[R], *, slow: bool = False
) -> Callable[[Callable[[Session, R], Result | Awaitable[Result]]], Handler]:
    """Registers what answers one type of request."""

    def register(handler: Callable[[Session, R], Result | Awaitable[Result]]) -> Handler:
        _HANDLERS[kind] = handler
        if slow:
            _SLOW.add(kind)
        return handler

    return register


# ---- who is there


@_answers(m.Hello)
def hello(session: Session, request: m.Hello) -> str:
    if request.protocol != m.PROTOCOL:
        raise Unsupported(
            f"this server speaks protocol {m.PROTOCOL}, the client asked for {request.protocol}"
        )
    server = session.service.config.server
    return json.dumps(
        {
            "protocol": m.PROTOCOL,
            "server": f"pie {__version__}",
            "login": ["none"] if session.service.gate.is_open else ["api-key", "public-key"],
            "chunk_bytes": m.CHUNK_BYTES,
            "max_request_bytes": server.max_request_bytes,
            "max_message_bytes": server.max_message_bytes,
            "max_file_bytes": server.max_file_bytes,
        }
    )


@_answers(m.AuthIdentify)
def auth_identify(session: Session, request: m.AuthIdentify) -> str:
    return _counted_login(session, lambda: session.login.identify(request.username))


@_answers(m.AuthProve)
def auth_prove(session: Session, request: m.AuthProve) -> str:
    return _counted_login(session, lambda: f"logged in as {session.login.prove(request.signature).user}")


@_answers(m.AuthByToken)
def auth_by_token(session: Session, request: m.AuthByToken) -> str:
    return _counted_login(session, lambda: f"logged in as {session.login.by_api_key(request.token).user}")


def _counted_login(session: Session, attempt: Callable[[], str]) -> str:
    for process in list(session.attached.values()):  # whoever comes now need not be who launched them
        session.detach(process)
    session.login.principal = None
    try:
        answer = attempt()
    except PieError as error:
        # As text: whoever keeps the record would keep the error's frames, and so this server.
        log.warning("%s was refused a login: %s", session.client.peer, str(error))
        session.service.metrics.logins.labels("refused").inc()
        raise
    if session.login.is_done:
        log.info("%s: %s", session.client.peer, answer)
        session.service.metrics.logins.labels("accepted").inc()
    return answer


@_answers(m.Ping)
def ping(session: Session, request: m.Ping) -> str:
    return "Pong"


@_answers(m.Query, slow=True)
async def query(session: Session, request: m.Query) -> str:
    if request.subject == "model_status":
        return json.dumps(model_status(await session.service.models.statuses()))
    if request.subject == "process_status":
        return json.dumps(_described(session.find(request.record)))
    raise InvalidRequest(
        f"nothing is known about {request.subject!r}; ask for model_status or process_status"
    )


@_answers(m.ReadStatus, slow=True)
async def read_status(session: Session, request: m.ReadStatus) -> str:
    status = await session.service.inspector.status(session.principal)
    return msgspec.json.encode(status).decode()


# ---- programs


@_answers(m.CheckProgram)
async def check_program(session: Session, request: m.CheckProgram) -> str:
    return json.dumps(await session.service.programs.has(request))


@_answers(m.AddProgram)
async def add_program(session: Session, request: m.AddProgram) -> Result:
    uploads = session.service.uploads_of(session.principal)
    chunk = Chunk(request.program_hash, request.chunk_index, request.total_chunks, request.chunk_data)
    content = session.receive(uploads, request.corr_id, chunk)
    if content is None:
        return None
    return (await session.service.programs.add(content, request)).label


@_answers(m.ResumeUpload)
def resume_upload(session: Session, request: m.ResumeUpload) -> str:
    return json.dumps(session.service.uploads_of(session.principal).next_chunk(request.program_hash))


@_answers(m.ListPrograms)
async def list_programs(session: Session, request: m.ListPrograms) -> str:
    return json.dumps(await session.service.programs.listing())


@_answers(m.RemoveProgram)
async def remove_program(session: Session, request: m.RemoveProgram) -> str:
    await session.service.programs.remove(request.name, request.version)
    return f"{request.name}@{request.version} is uninstalled"


# ---- processes


@_answers(m.LaunchProcess)
async def launch_process(session: Session, request: m.LaunchProcess) -> str:
    _refuse_budgets(session, [request.token_budget])
    source = await session.service.programs.find(request.inferlet)
    process = _launch(session, source, request, request.input, request.capture_outputs)
    return process.id


@_answers(m.LaunchProcesses)
async def launch_processes(session: Session, request: m.LaunchProcesses) -> str:
    _refuse_budgets(session, request.token_budgets or [])
    processes = await _launch_all(session, request, request.capture_outputs)
    return json.dumps([process.id for process in processes])


@_answers(m.RunProcesses, slow=True)
async def run_processes(session: Session, request: m.RunProcesses) -> str:
    _refuse_budgets(session, request.token_budgets or [])
    processes = await _launch_all(session, request, None)
    try:
        return json.dumps([await process.returned() for process in processes])
    finally:
        for process in processes:
            process.terminate("nobody waits for it any more")


async def _launch_all(
    session: Session, request: m.LaunchProcesses | m.RunProcesses, capture: bool | None
) -> list[ServerProcess]:
    """All or none: what was started is ended when another cannot be."""
    source = await session.service.programs.find(request.inferlet)
    processes: list[ServerProcess] = []
    try:
        for given in request.inputs:
            processes.append(_launch(session, source, request, given, capture))
    except PieError:
        for process in processes:
            session.detach(process)
            process.terminate("another program of the same request could not be started")
        raise
    return processes


def _launch(
    session: Session,
    source: ProgramSource,
    asked: m.LaunchProcess | m.LaunchProcesses | m.RunProcesses,
    given: str,
    capture: bool | None,
) -> ServerProcess:
    if not session.service.models.is_ready:
        states = ", ".join(f"{each['name']} is {each['state']}" for each in session.service.models.listing())
        raise Unavailable(f"the server is loading its models ({states}): try again soon (/ready tells when)")
    process = session.service.processes.launch(
        session.principal,
        asked.inferlet,
        source,
        given,
        keep_printed=bool(capture),
        priority=asked.priority,
        traceparent=asked.traceparent,
    )
    if capture:
        session.attach(process)
    return process


def _refuse_budgets(session: Session, budgets: list[int | None]) -> None:
    if any(budget is not None for budget in budgets):
        given = next(budget for budget in budgets if budget is not None)
        raise Unsupported(f"token budgets are not kept by this version: leave token_budget ({given}) out")


@_answers(m.AttachProcess)
def attach_process(session: Session, request: m.AttachProcess) -> str:
    process = session.find(request.process_id)
    session.attach(process, request.after)
    return json.dumps(_described(process))


@_answers(m.DetachProcess)
def detach_process(session: Session, request: m.DetachProcess) -> str:
    session.detach(session.find(request.process_id))
    return "detached"


@_answers(m.TerminateProcess)
def terminate_process(session: Session, request: m.TerminateProcess) -> str:
    session.find(request.process_id).terminate("its client ended it")
    return "terminated"


@_answers(m.SignalProcess)
def signal_process(session: Session, request: m.SignalProcess) -> str:
    session.find(request.process_id).signal(request.message)
    return "delivered"


@_answers(m.CloseInput)
def close_input(session: Session, request: m.CloseInput) -> str:
    session.find(request.process_id).close_input()
    return "closed"


@_answers(m.TransferFile)
def transfer_file(session: Session, request: m.TransferFile) -> Result:
    process = session.find(request.process_id)
    chunk = Chunk(request.file_hash, request.chunk_index, request.total_chunks, request.chunk_data)
    content = session.receive(session.files_for(process), request.corr_id, chunk)
    if content is None:
        return None
    process.give_file(content)
    return "delivered"


@_answers(m.ListProcesses)
def list_processes(session: Session, request: m.ListProcesses) -> str:
    found = session.service.processes.of(session.principal, request.include_ended)
    return json.dumps([_described(process) for process in found])


def _described(process: ServerProcess) -> dict[str, Any]:
    return {
        "id": process.id,
        "username": process.principal.user,
        "program": process.inferlet,
        "input": process.given[:1024],
        "elapsed_secs": round(process.elapsed_s, 3),
        "state": "running" if process.is_running else "ended",
        "attached": process.listener is not None,
        "last_seq": process.events.last_seq,
        "dropped": process.events.dropped,
    }


# ---- models


@_answers(m.ListModels)
def list_models(session: Session, request: m.ListModels) -> str:
    return json.dumps(session.service.models.listing())


@_answers(m.LoadModel, slow=True)
async def load_model(session: Session, request: m.LoadModel) -> str:
    await session.service.models.load(request.name)
    return f"{request.name} is loaded"


@_answers(m.UnloadModel, slow=True)
async def unload_model(session: Session, request: m.UnloadModel) -> str:
    await session.service.models.unload(request.name)
    return f"{request.name} is unloaded"


# ---- MCP


@_answers(m.RegisterMcpServer)
def register_mcp_server(session: Session, request: m.RegisterMcpServer) -> str:
    session.mcp.register(request)
    return f"{request.name} is registered"


@_answers(m.ListMcpServers)
def list_mcp_servers(session: Session, request: m.ListMcpServers) -> str:
    return json.dumps(session.mcp.names)


@_answers(m.McpResponse)
def mcp_response(session: Session, request: m.McpResponse) -> None:
    session.mcp.answered(request)


# ---- what Pie 0.4 has and this version has not


@_answers(m.LaunchDaemon)
def launch_daemon(session: Session, request: m.LaunchDaemon) -> str:
    raise Unsupported(
        f"this version runs no programs that serve HTTP on a port of their own, as {request.inferlet} would on"
        f" {request.port}: launch it as a process, and talk to it by messages"
    )


def _no_workflows(session: Session, request: m.Request) -> str:
    raise Unsupported(
        f"this version runs no workflows, which {type(request).__name__} asks for: launch the processes one by one"
    )


for _kind in (m.SubmitWorkflow, m.CancelWorkflow, m.AttachWorkflow, m.DetachWorkflow):
    _HANDLERS[_kind] = _no_workflows
