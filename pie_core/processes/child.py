"""A process that we started: talked to over a socket pair, watched by its heartbeat, and ended without a trace.

Slow is not dead. A process whose heartbeat stops is lost at once only if the system says that it is stopped; one that
keeps Python's lock or its event loop for long has until the deadline that it declares.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pie_core.errors import LoadError
from pie_core.paths import child_environment
from pie_core.processes.frames import FrameStream
from pie_core.processes.heartbeat import PERIOD_S, last_beat

_log = logging.getLogger(__name__)

_MISSED_S = 2 * PERIOD_S  # without a beat, before the system is asked whether the process is stopped
_POLL_S = 0.01
_EXIT_S = 0.2  # from the end of its stream to its exit status
_KILL_S = 10.0
_PIPE_BYTES = 1 << 12


class Child:
    """One process, from its start to its end. `take` gets its messages, `died` the reason if it is lost."""

    def __init__(
        self, module: str, kind: object, take: Callable[[Any], None], died: Callable[[str], None]
    ) -> None:
        self._module = module
        self._take = take
        self._died = died
        self._stream: FrameStream[Any] = FrameStream(kind, self._hear, self._hears_no_more)
        self._process: subprocess.Popen[bytes]
        self._beats: int | None = None
        self._silent_s = self._loop_silent_s = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._farewell: asyncio.Task[None] | None = None
        self._is_over = False
        self.deadline_s: float | None = (
            None  # for a sign of life, and for a turn of its event loop; None: none yet
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self) -> None:
        """Raises LoadError when the system starts no process."""
        ours, theirs = socket.socketpair()
        self._beats, beats = os.pipe()
        try:
            self._process = self._spawn(theirs.fileno(), beats)
        except OSError as error:
            ours.close()
            self._stop_watching()
            raise LoadError(f"cannot start a process for {self._module}: {error}") from error
        finally:
            theirs.close()
            os.close(beats)
        os.set_blocking(self._beats, False)
        asyncio.get_running_loop().add_reader(self._beats, self._feel)
        try:
            await self._stream.open(ours)
        except BaseException:  # cancelled, most likely: nothing is left behind
            ours.close()
            self._stop_watching()
            self._process.kill()
            self._process.wait()
            raise
        self._look_again()

    def send(self, message: msgspec.Struct) -> None:
        self._stream.send(message)

    async def end(self, patience_s: float) -> None:
        """Asks the process to end by ending the stream, kills it if it has not in time, and reaps it."""
        self._is_over = True
        self._stream.finish()
        try:
            await _has_exited(self._process, patience_s)
        finally:  # whoever is cancelled here leaves no process behind either
            self._kill()
        if not await _has_exited(self._process, _KILL_S):
            _log.warning("process %d was killed and does not end; it is left behind", self.pid)

    def _spawn(self, stream: int, beats: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", self._module, f"--stream={stream}", f"--beats={beats}"],
            pass_fds=(stream, beats),
            stdin=subprocess.DEVNULL,
            stdout=2,  # ours is for what programs return
            env=child_environment({"PYTHONPATH": _python_path()}),
            process_group=0,  # Ctrl-C in the terminal is ours to answer
        )

    # ---- signs of life

    def _hear(self, message: Any) -> None:
        if not self._is_over:
            self._take(message)

    def _feel(self) -> None:
        assert self._beats is not None
        beats = os.read(self._beats, _PIPE_BYTES)
        if not beats:
            self._stop_watching()
            return
        self._silent_s = 0.0
        self._loop_silent_s = last_beat(beats) or 0.0

    def _look_again(self) -> None:
        self._watch = asyncio.get_running_loop().call_later(PERIOD_S, self._look)

    def _look(self) -> None:
        """Silence is counted in looks, so that time in which we did not run ourselves is not held against anybody."""
        self._silent_s += PERIOD_S
        reason = self._hangs()
        if reason is None:
            self._look_again()
        else:
            self._lose(reason)

    def _hangs(self) -> str | None:
        if self._silent_s >= _MISSED_S and _is_stopped(self.pid):
            return "is stopped and gives no sign of life"
        if self.deadline_s is None:
            return None
        if self._silent_s > self.deadline_s:
            return f"has given no sign of life for {self._silent_s:.1f} s"
        if self._loop_silent_s > self.deadline_s:
            return f"has been at one turn of its event loop for {self._loop_silent_s:.1f} s"
        return None

    def _hears_no_more(self) -> None:
        if not self._is_over and self._farewell is None:
            self._farewell = asyncio.ensure_future(self._find_out())

    async def _find_out(self) -> None:
        """Its stream has ended; its exit status, which says why, comes a moment later."""
        exited = await _has_exited(self._process, _EXIT_S)
        self._lose(_ending(self._process.returncode) if exited else "has closed its connection")

    # ---- its end

    def _lose(self, reason: str) -> None:
        if not self._is_over:
            self._is_over = True
            self._kill()
            self._died(reason)

    def _kill(self) -> None:
        self._stop_watching()
        self._stream.abort()
        if self._process.poll() is None:
            self._process.kill()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._beats is not None:
            asyncio.get_running_loop().remove_reader(self._beats)
            os.close(self._beats)
            self._beats = None


async def _has_exited(process: subprocess.Popen[bytes], patience_s: float) -> bool:
    """Waits for it, and reaps it."""
    loop = asyncio.get_running_loop()
    end = loop.time() + patience_s
    while process.poll() is None:
        if loop.time() >= end:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _is_stopped(pid: int) -> bool:
    """By a signal, that is, and not by a debugger."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def _ending(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


def _python_path() -> str:
    """The child finds what this process finds, installed or not."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
