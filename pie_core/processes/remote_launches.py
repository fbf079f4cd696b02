"""Programs that programs in workers launch: the front starts them, and they may run in another worker.

guest ── RemoteLauncher ─► LaunchProgram ─► LaunchesOf ── Launcher of the front
      ◄─ RemoteLaunched ◄─ ProgramLaunched … LaunchedEnded ◄─┘
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from pie_core.errors import PieError, error_from_code
from pie_core.host_api.guest_state import LaunchedProgram, ProgramState
from pie_core.ids import ProcessId
from pie_core.processes.worker_messages import (
    CancelLaunched,
    ForgetLaunched,
    LaunchedEnded,
    LaunchProgram,
    ProgramLaunched,
)
from pie_core.sandbox.hosting import Pending


class RemoteLauncher:
    """The worker's end, for one of its programs: a Launcher that asks the front."""

    def __init__(
        self, parent: ProcessId, send: Callable[[LaunchProgram | CancelLaunched | ForgetLaunched], None]
    ) -> None:
        self._parent = parent
        self._send = send
        self._numbers = itertools.count(1)
        self._launching: dict[int, Pending[LaunchedProgram]] = {}
        self._running: dict[int, RemoteLaunched] = {}

    def launch(self, parent: ProgramState, program: str, given: str) -> Pending[LaunchedProgram]:
        number = next(self._numbers)
        launching: Pending[LaunchedProgram] = Pending(lambda: self._give_up(number))
        self._launching[number] = launching
        self._send(LaunchProgram(self._parent, number, program, given))
        return launching

    def cancel(self, number: int) -> None:
        self._send(CancelLaunched(self._parent, number))

    def _give_up(self, number: int) -> None:
        del self._launching[number]
        self.cancel(number)

    def forget(self, number: int) -> None:
        if self._running.pop(number, None) is not None:
            self._send(ForgetLaunched(self._parent, number))

    def launched(self, message: ProgramLaunched) -> None:
        launching = self._launching.pop(message.number, None)
        if launching is None:
            return  # it was given up, which the front is about to hear
        if message.process is None:
            launching.fail(error_from_code(message.code, message.message))
        else:
            child = RemoteLaunched(self, message.number, message.process)
            self._running[message.number] = child
            launching.resolve(child)

    def ended(self, message: LaunchedEnded) -> None:
        child = self._running.pop(message.number, None)
        if child is None:
            return
        if message.code:
            child.ended.fail(error_from_code(message.code, message.message))
        else:
            child.ended.resolve(message.value)


class RemoteLaunched:
    """A program that the front runs for one in this worker."""

    def __init__(self, launcher: RemoteLauncher, number: int, process: ProcessId) -> None:
        self.process = process
        self.ended: Pending[str | None] = Pending()
        self._launcher = launcher
        self._number = number

    def cancel(self) -> None:
        if not self.ended.done:
            self._launcher.cancel(self._number)

    def detach(self) -> None:
        self._launcher.forget(self._number)


class LaunchesOf:
    """The front's end, for one program in a worker."""

    def __init__(self, state: ProgramState, send: Callable[[ProgramLaunched | LaunchedEnded], None]) -> None:
        self._state = state
        self._send = send
        self._launching: dict[int, Pending[LaunchedProgram]] = {}
        self._running: dict[int, LaunchedProgram] = {}

    def launch(self, asked: LaunchProgram) -> None:
        try:
            launching = self._state.launch(asked.program, asked.given)
        except PieError as error:
            self._refuse(asked.number, error)
            return
        self._launching[asked.number] = launching
        launching.on_done(lambda: self._answer(asked.number, launching))

    def cancel(self, number: int) -> None:
        """The launch is given up, or the program ended."""
        launching = self._launching.pop(number, None)
        if launching is not None:
            launching.abandon()
        elif number in self._running:
            self._running[number].cancel()

    def forget(self, number: int) -> None:
        self._running.pop(number, None)

    def close(self) -> None:
        """The program that launched them has ended; they go on."""
        launching, self._launching = self._launching, {}
        for each in launching.values():
            each.abandon()
        self._running.clear()

    def _answer(self, number: int, launching: Pending[LaunchedProgram]) -> None:
        self._launching.pop(number, None)
        try:
            launched = launching.result()
        except Exception as error:  # whatever failed is the program's answer
            self._refuse(number, error)
            return
        self._running[number] = launched
        self._send(ProgramLaunched(self._state.process, number, launched.process))
        launched.ended.on_done(lambda: self._tell_end(number, launched.ended))

    def _refuse(self, number: int, error: Exception) -> None:
        self._send(ProgramLaunched(self._state.process, number, None, *_told(error)))

    def _tell_end(self, number: int, ended: Pending[str | None]) -> None:
        if self._running.pop(number, None) is None:
            return
        parent = self._state.process
        try:
            self._send(LaunchedEnded(parent, number, ended.result()))
        except PieError as error:
            self._send(LaunchedEnded(parent, number, None, *_told(error)))


def _told(error: Exception) -> tuple[str, str]:
    if isinstance(error, PieError):
        return error.code, str(error)
    return PieError.code, f"the program could not be launched: {type(error).__name__}: {error}"
