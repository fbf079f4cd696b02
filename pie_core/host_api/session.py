"""Messages and files between a program and the client that launched it."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from pie_core.errors import InvalidRequest
from pie_core.host_api.guest_state import Inbox, ProgramState
from pie_core.host_api.poll import Pollable
from pie_core.sandbox.hosting import Interface, Pending

interface = Interface("session")


class PendingMessage:
    """A message that was asked for; one that came and was never taken goes back to the front of its inbox."""

    def __init__(self, inbox: Inbox[str] | Inbox[bytes]) -> None:
        self._inbox = inbox
        self.item: Pending[Any] = inbox.get()
        self.taken = False

    def close(self) -> None:
        self.item.abandon()
        if self.item.done and not self.taken and self.item.value is not None:
            self._inbox.put_back(self.item.value)

    def text(self) -> str | None:
        """The message, or the file as base64; None when no more will come."""
        self.taken = True
        content = self.item.result()
        return base64.b64encode(content).decode("ascii") if isinstance(content, bytes) else content


interface.resource("pending-message", PendingMessage)


@interface.function("send", suspends=True)
def send(guest: ProgramState, message: str) -> Pending[None] | None:
    guest.spend(len(message))
    return guest.client.on_message(message)


@interface.function("send-file", suspends=True)
def send_file(guest: ProgramState, content: str) -> Pending[None] | None:
    try:
        data = base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"session.send-file takes base64 text: {error}") from None
    guest.spend(len(data))
    return guest.client.on_file(data)


@interface.function("receive")
def receive(guest: ProgramState) -> PendingMessage:
    return PendingMessage(guest.messages)


@interface.function("receive-file")
def receive_file(guest: ProgramState) -> PendingMessage:
    return PendingMessage(guest.files)


@interface.function("pending-message.pollable")
def pollable(guest: ProgramState, message: PendingMessage) -> Pollable:
    return Pollable.of(message.item)


@interface.function("pending-message.take", suspends=True)
def take(guest: ProgramState, message: PendingMessage) -> Pending[str | None]:
    return message.item.map(lambda _: message.text())
