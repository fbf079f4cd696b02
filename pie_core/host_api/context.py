"""A token history on KV pages, and the turns and tokens that wait to be appended to it (the buffer).

The engine owns the history and the pages. The worker's side here keeps the transcript, which is the buffer, and a
mirror of the rows' positions, so that asking for lengths costs no message.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import msgspec

from pie_core.engine.messages import (
    CreateContext,
    DeleteSnapshot,
    DropContext,
    EndManaging,
    Event,
    EvictRows,
    Failed,
    ForkContext,
    Forward,
    ForwardDone,
    OpenSnapshot,
    PinRows,
    ReadTokens,
    SamplerSpec,
    SaveSnapshot,
    SetPriority,
    SnapshotOpened,
    Tokens,
    TruncateContext,
)
from pie_core.engine.positions import PositionRuns, Run
from pie_core.errors import InvalidRequest, NotFound, error_from_code
from pie_core.host_api.guest_state import ProgramState, ServedModel
from pie_core.host_api.poll import Pollable
from pie_core.host_api.program_trace import until_done
from pie_core.host_api.replicas import Replicas, awaited, now, pending_of
from pie_core.ids import ContextId, RequestId
from pie_core.sandbox.hosting import Interface, Pending
from pie_core.text.chat import Transcript

interface = Interface("context")


class Attachment(msgspec.Struct, frozen=True):
    """What the worker adds to a snapshot."""

    transcript: bytes
    runs: list[Run]


class HostContext:
    """One context of one program.

    `rows` counts what was submitted; the engine's answers set it right once no pass is open.
    """

    __slots__ = (
        "_confirmed",
        "_fed",
        "_handed_out",
        "_open_passes",
        "_released",
        "_rows",
        "_rows_of_turns",
        "_transcript",
        "_turn",
        "committed_rows",
        "guest",
        "id",
        "is_managed",
        "model",
        "repeats",
    )

    def __init__(
        self, guest: ProgramState, model: ServedModel, transcript: Transcript, rows: PositionRuns
    ) -> None:
        self.guest = guest
        self.model = model
        self.id: ContextId = model.engine.new_context_id()
        self._transcript = transcript
        self._rows = rows
        self.repeats: SamplerSpec | None = None  # what a messages.Step would draw with, if one may follow
        # What turns did is noted where they are counted; the transcript and the rows learn it when somebody asks.
        self._turn: ContextTurn | None = None
        self._fed: list[int] = []
        self._rows_of_turns = 0
        self._confirmed = rows.length
        self._open_passes = 0
        self._handed_out: list[int] = []  # drained: in the transcript, and not yet written by a pass
        self._released = False
        self.is_managed = False  # whether the program manages its pages, see host_api.pages
        self.committed_rows = 0  # of them; they stay as they are

    @property
    def transcript(self) -> Transcript:
        if self._fed:
            fed, self._fed = self._fed, []
            self._transcript.note_generated(fed)
        return self._transcript

    @transcript.setter
    def transcript(self, transcript: Transcript) -> None:
        self._transcript = transcript

    @property
    def rows(self) -> PositionRuns:
        if self._rows_of_turns:
            self._rows.length += (
                self._rows_of_turns
            )  # at the positions that follow, as the pass before had it
            self._rows_of_turns = 0
        return self._rows

    def check_usable(self) -> None:
        if self._released:
            raise NotFound(f"context {self.id} was released; create, fork or open another")

    def submitted(self, count: int, positions: Sequence[int] | None = None) -> None:
        """A pass is on its way that writes `count` rows, at the next positions or at these."""
        self.repeats = None
        self._open_passes += 1
        if positions is None:
            self.rows.extend(count)
        else:
            self.rows.extend_at(positions)

    def may_repeat(self, sampler: SamplerSpec) -> None:
        """The pass just submitted draws one token behind its last row; turns with the same sampler may follow it."""
        if not self._handed_out:
            self.repeats = sampler

    def step(self, token: int) -> Pending[int] | int:
        """A turn that the program waits for; the engine may know the next token already."""
        found = None if self._open_passes else self.model.engine.step_now(self.id, token)
        if found is None:
            return self.turn(token, is_awaited=True)
        drawn, self._confirmed = found
        self._fed.append(token)
        self._rows_of_turns += 1
        return drawn

    def turn(self, token: int, *, is_awaited: bool) -> ContextTurn:
        """Feeds a token, and draws the one behind it. Turns that the program waits for, one by one, share an object."""
        turn = self._turn
        if turn is None or not is_awaited or not turn.done:
            turn = ContextTurn(self)
            if is_awaited and self._turn is None:
                self._turn = turn
        turn.done, turn.error = False, None
        turn.token = token
        self._open_passes += 1
        self._rows_of_turns += 1
        turn.request = self.model.engine.step(self.id, token, turn)
        return turn

    def settled(self, length: int) -> None:
        """A pass ended, and the context has this many rows."""
        self._confirmed = length
        self._end_pass()

    def turned(self, token: int, length: int) -> None:
        """A turn has fed its token, and the context has this many rows."""
        self._fed.append(token)
        is_one_more = length == self._confirmed + 1
        self._confirmed = length
        self._open_passes -= 1
        if not (is_one_more or self._open_passes):
            self._set_right()

    def failed(self) -> None:
        """A pass ended without a trace."""
        self.repeats = None
        self._end_pass()

    def fork(self) -> HostContext:
        self.check_usable()
        twin = HostContext(self.guest, self.model, self.transcript.fork(), self.rows.copy())
        self.model.engine.send(ForkContext(context=twin.id, source=self.id))
        return twin

    def truncate(self, length: int) -> None:
        """Keeps the first `length` rows and empties the buffer."""
        self.keep(length)
        self.transcript.truncate(length)
        self._handed_out = []
        self.model.engine.send(TruncateContext(context=self.id, length=length))

    def begin_managing(self) -> None:
        """The program manages the pages. Raises InvalidRequest if it does so already."""
        self.check_usable()
        if self.is_managed:
            raise InvalidRequest(
                f"the pages of context {self.id} are managed already: use what took them first"
            )
        self.is_managed = True

    def end_managing(self) -> None:
        self.is_managed, self.committed_rows = False, 0
        if not self._released:
            self.model.engine.send(EndManaging(context=self.id))

    def check_unmanaged(self) -> None:
        """Raises InvalidRequest for generations, which take pages as they go."""
        if self.is_managed:
            raise InvalidRequest(
                f"the program manages the pages of context {self.id}, and a generation takes pages as it goes: step"
                " through it with forward passes, or end the managing first"
            )

    def check_uncommitted(self, length: int) -> None:
        """Raises InvalidRequest if rows behind `length` are to stay as they are."""
        if length < self.committed_rows:
            raise InvalidRequest(
                f"cannot truncate to {length} rows: {self.committed_rows} are committed (pages.commit)"
            )

    def check_rows(self, start: int, end: int) -> None:
        if not start <= end <= self.rows.length:
            raise InvalidRequest(f"rows {start} to {end}: the context has {self.rows.length}")

    def drain(self) -> list[int]:
        """Hands the buffer out for a pass of the program's own."""
        tokens = self.transcript.drain()
        if tokens:
            self._handed_out += tokens
            self.repeats = None
        return tokens

    def note_fed(self, tokens: list[int]) -> None:
        """A pass of the program's own wrote these; the transcript knows those that were drained."""
        known = len(self._handed_out)
        if tokens[:known] == self._handed_out:
            tokens = tokens[known:]
        self._handed_out = []
        self.transcript.note_generated(tokens)

    def take_back(self) -> None:
        """Drops the last row and lets its token wait in the buffer again, to be continued from."""
        if not self.rows.length:
            raise InvalidRequest(
                f"empty input: context {self.id} holds no tokens to continue from; add a turn, tokens or a cue"
            )
        length = self.rows.length - 1
        self.check_uncommitted(length)
        self.repeats = None
        self.rows.truncate(length)
        self._confirmed = min(self._confirmed, length)
        self.transcript.take_back()
        self.model.engine.send(TruncateContext(context=self.id, length=length))

    def keep(self, length: int) -> None:
        """The engine dropped the rows past `length`."""
        self.repeats = None
        self.rows.truncate(length)
        self._confirmed = min(self._confirmed, length)

    def attachment(self) -> bytes:
        return msgspec.msgpack.encode(Attachment(self.transcript.to_bytes(), self.rows.runs))

    def restore(self, opened: SnapshotOpened) -> None:
        attachment = msgspec.msgpack.decode(opened.attachment, type=Attachment)
        self.transcript.restore(attachment.transcript)
        self._rows, self._rows_of_turns = PositionRuns(opened.length, attachment.runs), 0
        self._confirmed = opened.length

    def close(self) -> None:
        if not self._released:
            self._released = True
            self.repeats = self._turn = None  # whoever ends must not wait for the garbage collector
            self.model.engine.send(DropContext(context=self.id))

    def _end_pass(self) -> None:
        self._open_passes -= 1
        if self._open_passes == 0:
            self._set_right()

    def _set_right(self) -> None:
        self.rows.truncate(self._confirmed)
        self.rows.extend(self._confirmed - self.rows.length)  # what a generation wrote was not known before


class ContextTurn(Pending[int]):
    """One turn of a program's loop."""

    __slots__ = ("_context", "request", "token")

    def __init__(self, context: HostContext) -> None:
        super().__init__()
        self._context = context
        self.request = RequestId(0)
        self.token = 0

    def drew(self, token: int, length: int) -> None:
        self._context.turned(self.token, length)
        self.resolve(token)

    def hear(self, event: Event) -> None:
        assert isinstance(event, Failed), "a turn that went well is told by Stepped"
        self._context.failed()
        self.fail(error_from_code(event.code, event.message))

    def _unwanted(self) -> None:
        self._context.model.engine.cancel(self.request)


class PendingFlush:
    """The write of a context's buffer."""

    def __init__(self, written: Pending[None]) -> None:
        self.written = written

    def close(self) -> None:
        """The rows are written all the same."""


interface.resource("context", HostContext)
interface.resource("pending-flush", PendingFlush)


@interface.function("context.create")
def create(guest: ProgramState, model: ServedModel) -> HostContext:
    model = model.of(guest.process)
    context = HostContext(guest, model, model.text.transcript(), PositionRuns())
    seed = secrets.randbits(64)
    model.engine.send(
        CreateContext(
            context=context.id,
            process=guest.process,
            tenant=guest.tenant,
            seed=seed,
            priority=guest.priority,
        )
    )
    return context


@interface.function("context.open", suspends=True)
def open_(guest: ProgramState, model: ServedModel, name: str) -> Pending[HostContext]:
    if model.replicas is not None:
        return pending_of(_open_where_it_is(guest, model, model.replicas, name))
    return _open(guest, model, name, take=False)


@interface.function("context.take", suspends=True)
def take(guest: ProgramState, model: ServedModel, name: str) -> Pending[HostContext]:
    if model.replicas is not None:
        return pending_of(_take_where_it_is(guest, model, model.replicas, name))
    return _open(guest, model, name, take=True)


async def _open_where_it_is(
    guest: ProgramState, model: ServedModel, replicas: Replicas, name: str
) -> HostContext:
    engine = await replicas.find(guest.tenant, name)
    return await awaited(_open(guest, model.at(engine), name, take=False))


async def _take_where_it_is(
    guest: ProgramState, model: ServedModel, replicas: Replicas, name: str
) -> HostContext:
    engine = await replicas.find(guest.tenant, name)
    context = await awaited(_open(guest, model.at(engine), name, take=True))
    await replicas.forget_older(engine, guest.tenant, name, now())
    return context


def _open(guest: ProgramState, model: ServedModel, name: str, *, take: bool) -> Pending[HostContext]:
    context = HostContext(guest, model, model.text.transcript(), PositionRuns())

    def build(request: RequestId) -> OpenSnapshot:
        return OpenSnapshot(
            request=request,
            context=context.id,
            process=guest.process,
            tenant=guest.tenant,
            name=name,
            take=take,
            priority=guest.priority,
        )

    def finish(event: Event) -> HostContext:
        assert isinstance(event, SnapshotOpened)
        context.restore(event)
        return context

    return model.engine.request(build, finish)


@interface.function("context.delete", suspends=True)
def delete(guest: ProgramState, model: ServedModel, name: str) -> Pending[None]:
    if model.replicas is not None:
        return pending_of(model.replicas.delete(guest.tenant, name))
    return model.engine.request(
        lambda request: DeleteSnapshot(request=request, tenant=guest.tenant, name=name), lambda _: None
    )


@interface.function("context.fork")
def fork(guest: ProgramState, context: HostContext) -> HostContext:
    return context.fork()


@interface.function("context.save", suspends=True)
def save(guest: ProgramState, context: HostContext, name: str) -> Pending[None]:
    if not name:
        raise InvalidRequest("a snapshot needs a name that is not empty")
    replicas = context.model.replicas
    if replicas is not None:
        return pending_of(_save_as_newest(guest, context, replicas, name))
    return _save(context, name).map(lambda _: None)


async def _save_as_newest(guest: ProgramState, context: HostContext, replicas: Replicas, name: str) -> None:
    begun_at = now()
    await awaited(_save(context, name))
    await replicas.forget_older(context.model.engine, guest.tenant, name, begun_at)


@interface.function("context.snapshot", suspends=True)
def snapshot(guest: ProgramState, context: HostContext) -> Pending[str]:
    return _save(context, f"snapshot-{secrets.token_hex(8)}")


def _save(context: HostContext, name: str) -> Pending[str]:
    context.check_usable()
    attachment = context.attachment()
    return context.model.engine.request(
        lambda request: SaveSnapshot(request=request, context=context.id, name=name, attachment=attachment),
        lambda _: name,
    )


@interface.function("context.release")
def release(guest: ProgramState, context: HostContext) -> None:
    context.close()


@interface.function("context.add-text")
def add_text(guest: ProgramState, context: HostContext, role: str, text: str) -> None:
    context.check_usable()
    context.transcript.add_text(role, text)


@interface.function("context.equip")
def equip(guest: ProgramState, context: HostContext, tools: str) -> None:
    context.check_usable()
    context.transcript.equip(tools)


@interface.function("context.add-tool-call")
def add_tool_call(guest: ProgramState, context: HostContext, name: str, arguments: str, id_: str) -> None:
    context.check_usable()
    context.transcript.add_tool_call(name, arguments, id_)


@interface.function("context.add-tool-result")
def add_tool_result(guest: ProgramState, context: HostContext, name: str, content: str, id_: str) -> None:
    context.check_usable()
    context.transcript.add_tool_result(name, content, id_)


@interface.function("context.cue")
def cue(guest: ProgramState, context: HostContext) -> None:
    context.check_usable()
    context.transcript.cue()


@interface.function("context.seal")
def seal(guest: ProgramState, context: HostContext) -> None:
    context.check_usable()
    context.transcript.seal()


@interface.function("context.append")
def append(guest: ProgramState, context: HostContext, tokens: list[int]) -> None:
    context.check_usable()
    context.transcript.append(tokens)


@interface.function("context.buffer")
def buffer(guest: ProgramState, context: HostContext) -> list[int]:
    context.check_usable()
    return context.transcript.pending_tokens()


@interface.function("context.drain")
def drain(guest: ProgramState, context: HostContext) -> list[int]:
    context.check_usable()
    return context.drain()


@interface.function("context.take-back")
def take_back(guest: ProgramState, context: HostContext) -> None:
    context.check_usable()
    context.take_back()


@interface.function("context.flush")
def flush(guest: ProgramState, context: HostContext) -> PendingFlush:
    context.check_usable()
    before = context.transcript.fork()
    tokens = tuple(context.transcript.drain())
    if not tokens:
        return PendingFlush(Pending.of(None))
    after = context.transcript

    def finish(event: Event) -> None:
        assert isinstance(event, ForwardDone)
        context.settled(event.length)

    def restore() -> None:
        context.failed()
        if context.transcript is after:
            context.transcript = before

    context.submitted(len(tokens))
    fed = {"pie.tokens.fed": len(tokens)}
    span = None if guest.trace is None else guest.trace.begin("flush", fed)
    trace = None if span is None else span.traceparent
    written = context.model.engine.request(
        lambda request: Forward(request=request, context=context.id, tokens=tokens, trace=trace),
        finish,
        restore,
    )
    if span is not None:
        until_done(span, written)
    return PendingFlush(written)


@interface.function("pending-flush.pollable")
def pollable(guest: ProgramState, flush: PendingFlush) -> Pollable:
    return Pollable.of(flush.written)


@interface.function("pending-flush.cancel", suspends=True)
def cancel(guest: ProgramState, flush: PendingFlush) -> Pending[bool]:
    flush.written.cancel()
    return flush.written.undone()


@interface.function("pending-flush.finish", suspends=True)
def finish(guest: ProgramState, flush: PendingFlush) -> Pending[None]:
    return flush.written


@interface.function("context.length")
def length(guest: ProgramState, context: HostContext) -> int:
    return context.rows.length


@interface.function("context.position")
def position(guest: ProgramState, context: HostContext) -> int:
    return context.rows.next


@interface.function("context.page-size")
def page_size(guest: ProgramState, context: HostContext) -> int:
    return context.model.engine.info.page_size


@interface.function("context.tokens", suspends=True)
def tokens(guest: ProgramState, context: HostContext) -> Pending[list[int]]:
    context.check_usable()

    def finish(event: Event) -> list[int]:
        assert isinstance(event, Tokens)
        return event.tokens

    return context.model.engine.request(
        lambda request: ReadTokens(request=request, context=context.id), finish
    )


@interface.function("context.truncate")
def truncate(guest: ProgramState, context: HostContext, count: int) -> None:
    context.check_usable()
    if count > context.rows.length:
        raise InvalidRequest(f"cannot truncate {count} rows: the context has {context.rows.length}")
    context.check_uncommitted(context.rows.length - count)
    context.truncate(context.rows.length - count)


@interface.function("context.evict")
def evict(guest: ProgramState, context: HostContext, start: int, end: int) -> None:
    context.check_usable()
    context.check_rows(start, end)
    context.model.engine.send(EvictRows(context=context.id, start=start, stop=end))


@interface.function("context.pin")
def pin(guest: ProgramState, context: HostContext, start: int, end: int) -> None:
    context.check_usable()
    context.check_rows(start, end)
    context.model.engine.send(PinRows(context=context.id, start=start, stop=end))


@interface.function("context.priority")
def priority(guest: ProgramState, context: HostContext, value: int) -> None:
    context.check_usable()
    context.model.engine.send(SetPriority(context=context.id, priority=guest.allowed_priority(value)))
