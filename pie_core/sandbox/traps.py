"""Why a guest ended: wasmtime's text and host failures -> the typed errors of pie_core.errors, with what to try."""

from __future__ import annotations

import re

from pie_core.errors import GuestTrap, LimitExceeded, PieError, ProgramError, RequestError
from pie_core.sandbox.fibers import EngineOptions
from pie_core.sandbox.limits import Limits

FRAMES = 8
MIB = 1 << 20

_FRAME = re.compile(r"^\s*\d+:\s+(0x[0-9a-f]+ - )?(.*)$", re.M)


def explain(name: str, text: str, limits: Limits, options: EngineOptions) -> PieError:
    """A trap, with the likely cause first and the guest's frames below."""
    cause = text.rpartition("Caused by:")[2] if "Caused by:" in text else text
    cause = re.sub(r"^\s*\d+:\s*", "", cause.strip())
    return GuestTrap(f"{name} was stopped: {_likely(cause, limits, options)}{_frames(text)}")


def _likely(cause: str, limits: Limits, options: EngineOptions) -> str:
    if "call stack exhausted" in cause or "overflowed its stack" in cause:
        stack = options.wasm_stack_bytes // 1024
        return f"its call stack of {stack} KiB is exhausted; look for a recursion that does not end"
    if "unreachable" in cause:
        return (
            "it aborted (a panic, a failed assertion, or memory it was refused: "
            f"limits.memory_bytes is {limits.memory_bytes // MIB} MiB); what it printed before may say why"
        )
    if "out of bounds" in cause:
        return f"it reached outside its memory ({cause})"
    if "fuel allocated for hostcalls" in cause:
        return "it passed more than 128 MiB across the boundary in one call; pass it in parts"
    return cause or "wasmtime gave no reason"


def _frames(text: str) -> str:
    frames = [match.group(2) for match in _FRAME.finditer(text.partition("Caused by:")[0])]
    if not frames:
        return ""
    more = "" if len(frames) <= FRAMES else f"\n  … {len(frames) - FRAMES} more"
    return "".join(f"\n  at {frame}" for frame in frames[:FRAMES]) + more


def not_started(name: str, text: str, limits: Limits) -> PieError:
    """Instantiation failed."""
    if "exceeds memory limits" in text:
        size = limits.memory_bytes // MIB
        return GuestTrap(
            f"{name} needs more memory to start than limits.memory_bytes allows ({size} MiB): {text}"
        )
    if "matching implementation was not found" in text or "import" in text:
        return ProgramError(f"{name} does not fit this host: {text}")
    return GuestTrap(f"{name} failed while starting: {text}")


def exited(name: str, status: int) -> PieError | None:
    """None for a clean exit."""
    return (
        None
        if status == 0
        else GuestTrap(f"{name} exited with status {status}; what it printed before may say why")
    )


def host_failure(error: BaseException) -> PieError:
    """What ends a guest whose host function had no result to put its error in."""
    if isinstance(error, PieError) and (
        isinstance(error, LimitExceeded) or not isinstance(error, RequestError)
    ):
        return error
    return GuestTrap(f"a host function refused the call: {str(error) or type(error).__name__}")
