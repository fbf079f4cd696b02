"""What the host keeps for one running program: who it belongs to, its models, its link to the client and its inbox."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from pie_core.engine.messages import EndProcess
from pie_core.errors import LimitExceeded, NotFound, Unsupported
from pie_core.host_api.engine_client import EngineClient
from pie_core.host_api.program_trace import ProgramTrace
from pie_core.host_api.replicas import Replicas
from pie_core.ids import ModelName, ProcessId, Tenant
from pie_core.sandbox.hosting import Pending
from pie_core.sandbox.limits import Limits
from pie_core.text.text_model import TextModel

T = TypeVar("T", bound=Sized)


class ClientLink(Protocol):
    """Where a program's output goes. A Pending holds the program back until the client has taken it."""

    def on_message(self, message: str) -> Pending[None] | None: ...

    def on_file(self, content: bytes) -> Pending[None] | None: ...

    def on_stdout(self, data: bytes) -> Pending[None] | None: ...

    def on_stderr(self, data: bytes) -> Pending[None] | None: ...


class LaunchedProgram(Protocol):
    """A program that another one launched, as that one sees it."""

    @property
    def process(self) -> ProcessId: ...

    @property
    def ended(self) -> Pending[str | None]:
        """Its return value as JSON text, or the error that ended it."""

    def cancel(self) -> None: ...

    def detach(self) -> None:
        """Nobody will ask about it any more; it goes on."""


class Launcher(Protocol):
    """What programs launch others with."""

    def launch(self, parent: ProgramState, program: str, given: str) -> Pending[LaunchedProgram]:
        """`given` is the input as JSON text. Abandoning gives the launch up."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a program may do and pass on, once it runs."""

    limits: Limits
    max_children: int  # that it may run at a time
    children_option: str  # what raises that


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as programs see it: its engine, and its tokenizer and chat conventions."""

    name: ModelName
    engine: EngineClient
    text: TextModel
    replicas: Replicas | None = None  # of a model with several engines, of which `engine` is one

    @property
    def engines(self) -> tuple[EngineClient, ...]:
        return (self.engine,) if self.replicas is None else self.replicas.engines

    def at(self, engine: EngineClient) -> ServedModel:
        return self if engine is self.engine else replace(self, engine=engine)

    def of(self, process: ProcessId) -> ServedModel:
        """With the engine to which new contexts of a program go."""
        return self if self.replicas is None else self.at(self.replicas.of(process))

    def end(self, process: ProcessId) -> None:
        """Frees what a program has in its engines."""
        if self.replicas is None:
            self.engine.send(EndProcess(process))
        else:
            self.replicas.end(process)


def served_model(
    name: ModelName, engines: Sequence[EngineClient], text: TextModel, turn: int = 0
) -> ServedModel:
    """Of one engine or several; see Replicas for `turn`."""
    return ServedModel(name, engines[0], text, Replicas(engines, turn) if len(engines) > 1 else None)


class Inbox(Generic[T]):
    """Messages on their way to a program, bounded; those who wait come first come, first served."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._waiters: deque[Pending[T | None]] = deque()
        self._wanted = asyncio.Event()
        self._closed = False

    def put(self, item: T) -> None:
        """Raises LimitExceeded when the program has left too many unread."""
        waiter = self._next_waiter()
        if waiter is not None:
            waiter.resolve(item)
        elif len(self._items) >= self._capacity:
            raise LimitExceeded(f"the program has {self._capacity} unread messages: wait until it reads some")
        elif not self._closed:
            self._items.append(item)

    @property
    def unread_bytes(self) -> int:
        """How much waits here; of text its characters."""
        return sum(map(len, self._items))

    @property
    def is_wanted(self) -> bool:
        """Somebody waits for an item."""
        return any(not waiter.abandoned for waiter in self._waiters)

    async def wanted(self) -> None:
        """Returns once somebody waits for an item: the sender need not be read before that."""
        while not self.is_wanted:
            self._wanted.clear()
            await self._wanted.wait()

    def get(self) -> Pending[T | None]:
        """The next item; None once the inbox is closed and empty."""
        if self._items:
            return Pending.of(self._items.popleft())
        if self._closed:
            return Pending.of(None)
        waiter: Pending[T | None] = Pending()
        self._waiters.append(waiter)
        self._wanted.set()
        return waiter

    def put_back(self, item: T) -> None:
        """Returns an item that was handed out and not used; it comes next."""
        waiter = self._next_waiter()
        if waiter is not None:
            waiter.resolve(item)
        else:
            self._items.appendleft(item)

    def close(self) -> None:
        """The sender will send no more."""
        self._closed = True
        while (waiter := self._next_waiter()) is not None:
            waiter.resolve(None)

    def _next_waiter(self) -> Pending[T | None] | None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.abandoned:
                return waiter
        return None


class ProgramState:
    """Satisfies `sandbox.hosting.GuestState`; one for each running program."""

    def __init__(
        self,
        process: ProcessId,
        username: str,
        tenant: Tenant,
        models: Mapping[ModelName, ServedModel],
        client: ClientLink,
        max_sent_bytes: int = 16 << 20,
        inbox_capacity: int = 1024,
        priority: int = 0,
        traceparent: str | None = None,
        launcher: Launcher | None = None,
        parent: ProgramState | None = None,
    ) -> None:
        self.process = process
        self.username = username
        self.tenant = tenant
        self.models = models
        self.client = client
        self.priority = priority
        self.traceparent = traceparent  # of the trace that it belongs to
        self.trace: ProgramTrace | None = None  # set while that is recorded here
        self.launcher = launcher
        self.depth: int = 0 if parent is None else parent.depth + 1  # of launches by programs
        self.inherited = None if parent is None else parent.standing
        self.standing: Standing | None = None
        self._max_sent_bytes = max_sent_bytes
        self._sent_bytes = 0
        self.messages: Inbox[str] = Inbox(inbox_capacity)
        self.files: Inbox[bytes] = Inbox(inbox_capacity)

    @property
    def name(self) -> str:
        return self.process

    def model(self, name: str) -> ServedModel:
        """The empty name is the first model. Raises NotFound that lists what is served."""
        if not name and self.models:
            return next(iter(self.models.values()))
        found = self.models.get(ModelName(name))
        if found is None:
            served = ", ".join(self.models) or "none"
            raise NotFound(f"no model is served under the name {name!r}; served are: {served}")
        return found

    def launch(self, program: str, given: str) -> Pending[LaunchedProgram]:
        """Starts another one beside it; `given` is JSON. Raises Unsupported where programs cannot do so."""
        if self.launcher is None:
            raise Unsupported(f"programs cannot launch others here, and {program!r} was to be")
        return self.launcher.launch(self, program, given)

    def allowed_priority(self, value: int) -> int:
        """Raises LimitExceeded for more than the program was launched with."""
        if value > self.priority:
            raise LimitExceeded(
                f"priority {value}: the program was launched with {self.priority} and may ask for that or less;"
                " whoever launches it can give it more (server.max_priority)"
            )
        return value

    def spend(self, size: int) -> None:
        """Counts what is about to be sent to the client. Raises LimitExceeded beyond the limit."""
        if self._sent_bytes + size > self._max_sent_bytes:
            raise LimitExceeded(
                f"the program has sent {self._sent_bytes} bytes and {size} more would exceed"
                f" runtime.output_bytes = {self._max_sent_bytes}"
            )
        self._sent_bytes += size

    def write_stdout(self, data: bytes) -> Pending[None] | None:
        return self.client.on_stdout(data)

    def write_stderr(self, data: bytes) -> Pending[None] | None:
        return self.client.on_stderr(data)

    def close_input(self) -> None:
        """The client will send no more messages and files."""
        self.messages.close()
        self.files.close()

    def close(self) -> None:
        self.close_input()
        for model in self.models.values():
            model.end(self.process)
