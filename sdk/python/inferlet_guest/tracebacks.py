"""Tracebacks as the author of a program wants them: his own files and lines, without the SDK's frames around."""

from __future__ import annotations

import traceback
from collections.abc import Collection

from inferlet.errors import InferletError


def describe(error: BaseException, user_files: Collection[str]) -> str:
    """The error's traceback from the first frame in a user file on; text that any encoding can carry."""
    try:
        trace = traceback.TracebackException.from_exception(error)
        _trim(trace, error, user_files)
        text = "".join(trace.format())
    except (MemoryError, RecursionError):
        text = f"{type(error).__name__}: {str(error)[:1000]}"
    return text.encode("utf-8", "backslashreplace").decode()


def _trim(trace: traceback.TracebackException, error: BaseException, user_files: Collection[str]) -> None:
    frames = list(trace.stack)
    own = [index for index, frame in enumerate(frames) if frame.filename in user_files]
    # A refusal of the host says all in its message; the SDK's way to it is of no interest.
    refused = isinstance(error, InferletError)
    if own:
        trace.stack = traceback.StackSummary.from_list(frames[own[0] : own[-1] + 1 if refused else None])
    elif refused or isinstance(error, SyntaxError):
        trace.stack = traceback.StackSummary()
    _trim_if_there(trace.__cause__, error.__cause__, user_files)
    _trim_if_there(trace.__context__, error.__context__, user_files)
    if isinstance(error, BaseExceptionGroup):
        for other, member in zip(
            trace.exceptions or (), error.exceptions, strict=False
        ):  # a large group is cut
            _trim(other, member, user_files)


def _trim_if_there(
    trace: traceback.TracebackException | None, error: BaseException | None, user_files: Collection[str]
) -> None:
    if trace is not None and error is not None:
        _trim(trace, error, user_files)
