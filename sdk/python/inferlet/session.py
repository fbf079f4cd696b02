"""Messages and files between the program and the client that launched it."""

from __future__ import annotations

import base64
import json
from typing import Any

from wit_world.imports import session as bindings

from inferlet.host import call, finish


def send(message: Any) -> None:
    """Sends a message; anything but text is sent as JSON."""
    call(bindings.send, message if isinstance(message, str) else _as_json(message))


def _as_json(message: Any) -> str:
    if hasattr(message, "model_dump_json"):
        text: str = message.model_dump_json()
        return text
    return json.dumps(message, default=str)


async def receive() -> str | None:
    """The client's next message; None once it will send no more."""
    pending = bindings.receive()
    return await finish(pending.pollable, pending.take)


def send_file(data: bytes) -> None:
    """Sends a file's content."""
    call(bindings.send_file, base64.b64encode(data).decode("ascii"))


async def receive_file() -> bytes | None:
    """The content of the client's next file; None once it will send no more."""
    pending = bindings.receive_file()
    content = await finish(pending.pollable, pending.take)
    return None if content is None else base64.b64decode(content)
