"""The side of programs without their guests: contexts and generations over a real engine, and what they send it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pie_core.engine.engine import Engine
from pie_core.engine.local_port import LocalPort
from pie_core.engine.messages import Command, Event, EventSink
from pie_core.engine.options import EngineOptions
from pie_core.host_api import context as contexts
from pie_core.host_api.context import HostContext
from pie_core.host_api.engine_client import EngineClient
from pie_core.host_api.forward import HostSampler
from pie_core.host_api.guest_state import ProgramState, ServedModel
from pie_core.ids import ModelName, ProcessId, Tenant
from pie_core.sandbox.hosting import Pending
from pie_core.text.text_model import TextModel, load_text
from pie_plugins.drivers.dummy import CHECKPOINT
from tests.core.engine.codec_port import CodecPort
from tests.core.engine.stepping import VOCAB, dummy

T = TypeVar("T")

_TEXT: list[TextModel] = []


class HeardPort(CodecPort):
    """Keeps what is sent, in the order in which the engine takes it."""

    def __init__(self, port: LocalPort) -> None:
        super().__init__(port)
        self.sent: list[Command] = []
        self.hears: Callable[[Sequence[Event]], None] = lambda events: None

    def listen(self, sink: EventSink) -> None:
        def heard(events: Sequence[Event]) -> None:
            self.hears(events)
            sink(events)

        super().listen(heard)

    def send(self, command: Command) -> None:
        self.sent.append(command)
        super().send(command)

    def send_last(self, build: Callable[[], Command | None]) -> None:
        def heard() -> Command | None:
            command = build()
            if command is not None:
                self.sent.append(command)
            return command

        super().send_last(heard)


class Side:
    """One program; `sent` is what the engine was asked."""

    def __init__(self, port: HeardPort) -> None:
        self.port = port
        self.client = EngineClient(port)
        self.model = ServedModel(ModelName("m"), self.client, _text())
        self.state = ProgramState(
            ProcessId("p"), "user", Tenant("t"), {self.model.name: self.model}, _NoClient()
        )

    @property
    def sent(self) -> list[Command]:
        return self.port.sent

    def context(self) -> HostContext:
        return contexts.create(self.state, self.model)


class _NoClient:
    """A client that hears nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def _text() -> TextModel:
    if not _TEXT:
        _TEXT.append(load_text(CHECKPOINT, VOCAB))
    return _TEXT[0]


@asynccontextmanager
async def side(driver: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Side]:
    port = HeardPort(LocalPort(Engine(dummy(**(driver or {})), EngineOptions(**options), "m")))
    try:
        yield Side(port)
    finally:
        await port.close()


def sampler(**values: object) -> HostSampler:
    made = HostSampler()
    made.change(**values)
    return made


async def value(pending: Pending[T]) -> T:
    """What a suspending host function gives in the end."""
    done = asyncio.Event()
    pending.on_done(done.set)
    await asyncio.wait_for(done.wait(), 10)
    return pending.result()
