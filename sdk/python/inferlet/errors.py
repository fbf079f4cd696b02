"""Every error that a program can meet, by the stable code that the host gives it.

InferletError              .code and .message; also codes that this SDK does not know yet
├── InvalidRequest         malformed: token ids out of range, an empty pass, a released context
├── Unsupported            this model, driver or version of pie cannot do it
├── NotFound               no such model, snapshot or file
├── PageShared             a write would touch KV that another context still reads
├── OutOfPages             no KV memory left, and waiting would not free any
├── LimitExceeded          a quota of this program or its user
├── ForwardFailed          a pass was accepted and failed
├── EngineLost             the engine process died; its contexts are gone
├── Cancelled              somebody ended what was being waited for
├── DeadlineExceeded       it took longer than it was given; a TimeoutError
└── Deadlock               every task of this program waits for another one
"""

from __future__ import annotations

from typing import ClassVar


class InferletError(Exception):
    """Base of the tree; `code` is the kebab-case name that the host and the client know."""

    default_code: ClassVar[str] = "error"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code


class InvalidRequest(InferletError, ValueError):
    default_code = "invalid-request"


class Unsupported(InferletError, NotImplementedError):
    default_code = "unsupported"


class NotFound(InferletError, LookupError):
    default_code = "not-found"


class PageShared(InferletError):
    default_code = "page-shared"


class OutOfPages(InferletError):
    default_code = "out-of-pages"


class LimitExceeded(InferletError):
    default_code = "limit-exceeded"


class ForwardFailed(InferletError):
    default_code = "forward"


class EngineLost(InferletError):
    default_code = "engine-lost"


class Cancelled(InferletError):
    default_code = "cancelled"


class DeadlineExceeded(InferletError, TimeoutError):
    default_code = "deadline-exceeded"


class Deadlock(InferletError):
    default_code = "deadlock"


_BY_CODE: dict[str, type[InferletError]] = {
    kind.default_code: kind for kind in InferletError.__subclasses__()
}


def error_from_code(code: str, message: str) -> InferletError:
    """The exception for a code; an unknown one is an InferletError that keeps it."""
    return _BY_CODE.get(code, InferletError)(message, code)


def not_in_this_version(feature: str) -> Unsupported:
    """The refusal of a part of the 0.4 API that this version does not have."""
    return Unsupported(f"{feature}: not available in this version of pie")
