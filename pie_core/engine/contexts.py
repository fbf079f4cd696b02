"""The contexts of an engine by id, and what is done to a whole one: create, fork, open, truncate, save, drop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pie_core.engine.context import Context
from pie_core.engine.messages import (
    Ack,
    Answer,
    CreateContext,
    ForkContext,
    OpenSnapshot,
    ReadTokens,
    SaveSnapshot,
    SnapshotOpened,
    Tokens,
    TruncateContext,
)
from pie_core.engine.quotas import Quotas
from pie_core.engine.snapshots import Snapshots
from pie_core.errors import InvalidRequest, LimitExceeded, NotFound, PieError
from pie_core.ids import ContextId, ProcessId, Tenant
from pie_core.kv_pages.context_pages import Cache, ContextPages


class Contexts:
    def __init__(
        self, cache: Cache, snapshots: Snapshots, quotas: Quotas, emit: Callable[[Answer], None]
    ) -> None:
        self._cache = cache
        self._quotas = quotas
        self._snapshots = snapshots
        self._emit = emit
        self._by_id: dict[ContextId, Context] = {}

    def __iter__(self) -> Iterator[Context]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, id_: ContextId) -> Context | None:
        return self._by_id.get(id_)

    def create(self, command: CreateContext) -> None:
        self._refuse_known(command.context)
        context = self._add(command.context, command.process, command.tenant, command.seed)
        context.priority = command.priority
        self._count(context)

    def open(self, command: OpenSnapshot) -> None:
        self._refuse_known(command.context)
        context = self._add(command.context, command.process, command.tenant, 0)
        context.priority = command.priority
        try:
            self._count(context)
            attachment = self._snapshots.open(command.tenant, command.name, context, take=command.take)
        except (NotFound, LimitExceeded):
            self.forget(context)
            raise
        length, position = context.length, context.position
        self._emit(
            SnapshotOpened(request=command.request, length=length, position=position, attachment=attachment)
        )

    def announce_fork(self, command: ForkContext) -> Context:
        """The child exists from now on, but waits until its source has got to the fork. Returns the source."""
        self._refuse_known(command.context)
        source = self._by_id.get(command.source)
        if source is None:
            child = self._add(command.context, ProcessId(""), Tenant(""), 0)
            child.fault, child.lost = no_context(command.source), True
            raise child.fault
        child = self._add(command.context, source.process, source.tenant, 0)
        self._count(child)
        child.unborn = True
        return source

    def forget(self, context: Context) -> None:
        """Its id is free, and its pages are as soon as no step uses them."""
        del self._by_id[context.id]
        context.dropped = True
        if context.counted:
            self._quotas.remove_context(context)
        context.manage_by_itself()
        if not context.busy:
            context.pages.release()

    # ---- in a context's turn

    def fork(self, source: Context, command: ForkContext) -> Context | None:
        child = self._by_id.get(command.context)
        if child is not None:
            child.take_over(source)
            child.priority = source.priority
        return child

    def lose_child(self, command: ForkContext, error: PieError) -> Context | None:
        """The fork could not be made: every request on the child is told why."""
        child = self._by_id.get(command.context)
        if child is not None:
            child.unborn, child.lost, child.fault = False, True, error
        return child

    def truncate(self, context: Context, command: TruncateContext) -> None:
        if not 0 <= command.length <= context.length:
            raise InvalidRequest(
                f"cannot truncate to {command.length} rows: the context has {context.length}"
            )
        if context.raw is not None and command.length < context.raw.committed_rows:
            raise InvalidRequest(
                f"cannot truncate to {command.length} rows: {context.raw.committed_rows} are committed"
            )
        if command.length < context.length:
            context.rewind(command.length)
            context.epoch = (context.epoch + 1) & 0xFFFFFFFF

    def save(self, context: Context, command: SaveSnapshot) -> None:
        self._snapshots.save(context, command.name, command.attachment)
        self._emit(Ack(request=command.request))

    def read_tokens(self, context: Context, command: ReadTokens) -> None:
        self._emit(Tokens(request=command.request, tokens=context.history.tokens.tolist()))

    def _add(self, id_: ContextId, process: ProcessId, tenant: Tenant, seed: int) -> Context:
        pages = ContextPages.empty(self._cache)
        context = Context(id=id_, process=process, tenant=tenant, stream=seed & (1 << 64) - 1, pages=pages)
        self._by_id[id_] = context
        return context

    def _count(self, context: Context) -> None:
        """One context too many is none: whoever uses it is told why."""
        try:
            self._quotas.add_context(context.process, context.tenant)
        except LimitExceeded as error:
            context.fault, context.lost = error, True
            raise
        context.counted = True

    def _refuse_known(self, id_: ContextId) -> None:
        if id_ in self._by_id:
            raise InvalidRequest(f"context {id_} exists already; choose another id")


def no_context(id_: ContextId) -> NotFound:
    return NotFound(f"there is no context {id_}: it was dropped, or never made")
