"""What a program may know about where it runs."""

from __future__ import annotations

from pie_core import __version__
from pie_core.host_api.guest_state import ProgramState
from pie_core.sandbox.hosting import Interface

interface = Interface("runtime")


@interface.function("version")
def version(guest: ProgramState) -> str:
    return __version__


@interface.function("instance-id")
def instance_id(guest: ProgramState) -> str:
    return guest.process


@interface.function("username")
def username(guest: ProgramState) -> str:
    return guest.username


@interface.function("models")
def models(guest: ProgramState) -> list[str]:
    return list(guest.models)


@interface.function("priority")
def priority(guest: ProgramState) -> int:
    return guest.priority
