"""Every error that pie raises on purpose, as one tree.

    PieError
    ├── ConfigError            a YAML file or option is wrong (carries file, line and key path in its text)
    ├── PluginError            a plugin is missing, broken, or claims a taken name
    ├── LoadError              a checkpoint, tokenizer or GGUF file cannot be used
    │   └── FetchError             a model cannot be brought here: no network, no installer, disk full, wrong content
    ├── ProgramError           an inferlet cannot be compiled, linked or started
    │   └── ProgramTooLarge        it exceeds a size, time or memory limit of compilation
    ├── GuestError             a running inferlet failed; its own traceback is the message
    │   ├── GuestTrap              the sandbox stopped it: trap, stack overflow, out of memory
    │   ├── WorkerLost             the process that ran it died or hung
    │   ├── DeadlineExceeded       it used up its CPU or wall time
    │   └── Cancelled              somebody ended it
    ├── RequestError           what a guest asked for is refused; nothing has changed
    │   ├── InvalidRequest         malformed: token ids out of range, empty pass, bad positions
    │   ├── Unsupported            this driver or model cannot do it (names both)
    │   ├── NotFound               no such context, snapshot, model, handle
    │   ├── PageShared             a write would touch KV that another context still reads
    │   ├── OutOfPages             no KV memory left, and waiting would not free any
    │   ├── LimitExceeded          a quota of the guest or tenant
    │   └── McpRefused             an MCP server answered with an error; its JSON is the message
    ├── ForwardError           a pass was accepted and failed; carries the driver's cause
    ├── EngineLost             the engine process or its GPU died; its contexts are gone
    └── ServiceError           between a server and its clients
        ├── ProtocolError          a message that is malformed, unknown, or not to be sent now
        ├── Unauthenticated        no credentials, or none that hold (any more)
        ├── AccessDenied           the credentials do not cover this
        ├── Unavailable            the server is starting, stopping or full: try again later
        └── Disconnected           the connection ended before the answer came

`code` is the stable, machine-readable name that crosses the guest and client boundaries; the class can be
found again with `error_from_code`. A message says where, what was seen, what was expected and what to try.
"""

from __future__ import annotations

from typing import ClassVar


class PieError(Exception):
    """Base of the tree; `code` is the kebab-case name that crosses process and guest boundaries."""

    code: ClassVar[str] = "error"


class ConfigError(PieError):
    code = "config"


class PluginError(PieError):
    code = "plugin"


class LoadError(PieError):
    code = "load"


class FetchError(LoadError):
    code = "fetch"


class ProgramError(PieError):
    code = "program"


class ProgramTooLarge(ProgramError):
    code = "program-too-large"


class GuestError(PieError):
    code = "guest"


class GuestTrap(GuestError):
    code = "guest-trap"


class WorkerLost(GuestError):
    code = "worker-lost"


class DeadlineExceeded(GuestError):
    code = "deadline-exceeded"


class Cancelled(GuestError):
    code = "cancelled"


class RequestError(PieError):
    code = "request"


class InvalidRequest(RequestError):
    code = "invalid-request"


class Unsupported(RequestError):
    code = "unsupported"


class NotFound(RequestError):
    code = "not-found"


class PageShared(RequestError):
    code = "page-shared"


class OutOfPages(RequestError):
    code = "out-of-pages"


class LimitExceeded(RequestError):
    code = "limit-exceeded"


class McpRefused(RequestError):
    code = "mcp"


class ForwardError(PieError):
    code = "forward"


class EngineLost(PieError):
    code = "engine-lost"


class ServiceError(PieError):
    code = "service"


class ProtocolError(ServiceError):
    code = "protocol"


class Unauthenticated(ServiceError):
    code = "unauthenticated"


class AccessDenied(ServiceError):
    code = "access-denied"


class Unavailable(ServiceError):
    code = "unavailable"


class Disconnected(ServiceError):
    code = "disconnected"


def _tree(root: type[PieError]) -> dict[str, type[PieError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_from_code(code: str, message: str) -> PieError:
    """The error that `code` names, or a plain PieError that keeps an unknown code in its text."""
    kind = _tree(PieError).get(code)
    return kind(message) if kind is not None else PieError(f"{code}: {message}")
