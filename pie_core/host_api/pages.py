"""KV pages of a context by hand: reserved, written by forward passes, committed, released."""

from __future__ import annotations

from pie_core.engine.messages import Event, ManagePages, PageCounts
from pie_core.host_api.context import HostContext
from pie_core.host_api.guest_state import ProgramState
from pie_core.sandbox.hosting import Interface, Pending

interface = Interface("pages")


class HostRawPages:
    """The pages of one context, while its program manages them. Counts are those of the engine's last answer."""

    __slots__ = ("_count", "committed", "context")

    def __init__(self, context: HostContext) -> None:
        self.context = context
        self.committed = 0
        self._count = 0

    @property
    def working(self) -> int:
        return self._count - self.committed

    @property
    def working_rows(self) -> int:
        return self.context.rows.length - self.context.committed_rows

    def manage(self, *, commit: int = 0, release: int = 0, reserve: int = 0) -> Pending[None]:
        """Without changes it begins."""
        context = self.context
        context.check_usable()
        context.repeats = None

        def finish(event: Event) -> None:
            assert isinstance(event, PageCounts)
            self.committed, self._count = event.committed, event.count
            context.committed_rows = event.committed * context.model.engine.info.page_size

        return context.model.engine.request(
            lambda request: ManagePages(request, context.id, commit, release, reserve), finish
        )

    def close(self) -> None:
        self.context.end_managing()


interface.resource("raw-pages", HostRawPages)


@interface.function("raw-pages.take", suspends=True)
def take(guest: ProgramState, context: HostContext) -> Pending[HostRawPages]:
    context.begin_managing()
    pages = HostRawPages(context)
    begun = pages.manage()
    begun.on_done(lambda: context.end_managing() if begun.error is not None else None)
    return begun.map(lambda _: pages)


@interface.function("raw-pages.committed")
def committed(guest: ProgramState, pages: HostRawPages) -> int:
    return pages.committed


@interface.function("raw-pages.working")
def working(guest: ProgramState, pages: HostRawPages) -> int:
    return pages.working


@interface.function("raw-pages.working-rows")
def working_rows(guest: ProgramState, pages: HostRawPages) -> int:
    return pages.working_rows


@interface.function("raw-pages.reserve", suspends=True)
def reserve(guest: ProgramState, pages: HostRawPages, count: int) -> Pending[None]:
    return pages.manage(reserve=count)


@interface.function("raw-pages.commit", suspends=True)
def commit(guest: ProgramState, pages: HostRawPages, count: int) -> Pending[None]:
    return pages.manage(commit=count)


@interface.function("raw-pages.release", suspends=True)
def release(guest: ProgramState, pages: HostRawPages, count: int) -> Pending[None]:
    return pages.manage(release=count)
