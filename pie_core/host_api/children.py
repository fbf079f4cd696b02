"""Programs that a program launches: they run beside it, for the same user, and can be asked for their result."""

from __future__ import annotations

from pie_core.host_api.guest_state import LaunchedProgram, ProgramState
from pie_core.host_api.poll import Pollable
from pie_core.sandbox.hosting import Interface, Pending

interface = Interface("children")


class HostChild:
    """The handle of a program on one that it launched."""

    __slots__ = ("launched",)

    def __init__(self, launched: LaunchedProgram) -> None:
        self.launched = launched

    def close(self) -> None:
        """It goes on by itself."""
        self.launched.detach()


interface.resource("child", HostChild)


@interface.function("launch", suspends=True)
def launch(guest: ProgramState, program: str, given: str) -> Pending[HostChild]:
    launching = guest.launch(program, given)
    started = launching.map(HostChild)
    started.on_abandon = launching.abandon
    return started


@interface.function("child.pid")
def pid(guest: ProgramState, child: HostChild) -> str:
    return child.launched.process


@interface.function("child.pollable")
def pollable(guest: ProgramState, child: HostChild) -> Pollable:
    return Pollable.of(child.launched.ended)


@interface.function("child.get", suspends=True)
def get(guest: ProgramState, child: HostChild) -> Pending[str | None]:
    return child.launched.ended.map(lambda value: value)


@interface.function("child.cancel")
def cancel(guest: ProgramState, child: HostChild) -> None:
    child.launched.cancel()
