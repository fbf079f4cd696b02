"""Tracebacks as the author of a program wants them: his own files and lines, without the SDK's frames around."""

from __future__ import annotations

import traceback
from collections.abc import Collection

from inferlet.errors import InferletError


def describe(error: BaseException, user_files: Collection[str]) -> str:
    """The error's traceback from the first frame in a user file on; text that any encoding can carry."""
    try:
        trace = traceback.TracebackException.from_exception(error)
        _trim(trace, user_files)
        text = "".join(trace.format())
    except (MemoryError, RecursionError):
        text = f"{type(error).__name__}: {str(error)[:1000]}"
    return text.encode("utf-8", "backslashreplace").decode()


def _trim(trace: traceback.TracebackException, user_files: Collection[str]) -> None:
    refusal = _is(trace, InferletError)
    frames = list(trace.stack)
    own = [index for index, frame in enumerate(frames) if frame.filename in user_files]
    if own:
        # A refusal of the host says all in its message; the SDK's way to it is of no interest.
        trace.stack = traceback.StackSummary.from_list(frames[own[0] : own[-1] + 1 if refusal else None])
    elif refusal or _is(trace, SyntaxError):
        trace.stack = traceback.StackSummary()
    for other in (trace.__cause__, trace.__context__, *(trace.exceptions or ())):
        if other is not None:
            _trim(other, user_files)


def _is(trace: traceback.TracebackException, kind: type[BaseException]) -> bool:
    return issubclass(trace.exc_type, kind)
